//! A part of the configuration as text on the command line, as `field=value,field=value`.
//!
//! What a value is depends on what its field has to be: `7` is a number or a name, and `true` a choice or a
//! name. So the text is read as the type of the configuration asks for it.

use serde::de::value::{Error, MapDeserializer};
use serde::de::{DeserializeOwned, Deserializer, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;

/// What is known of a field.
enum Value<'a> {
    /// Its name alone.
    Flag,
    /// What is behind the `=`.
    Text(&'a str),
    /// Fields of its own.
    Fields(Fields<'a>),
}

type Fields<'a> = Vec<(&'a str, Value<'a>)>;

/// A part of the configuration from its fields. A name alone is true; `a.b=1` is the field `b` of `a`.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let mut fields = Fields::new();
    for field in text.split(',') {
        let (path, value) = match field.split_once('=') {
            Some((path, value)) => (path, Value::Text(value)),
            None => (field, Value::Flag),
        };
        if !insert(&mut fields, path, value) {
            return Err(format!("{path}: must be given once"));
        }
    }
    serde_path_to_error::deserialize(Value::Fields(fields)).map_err(|error| {
        let path = error.path().to_string();
        // What is missing is at no path.
        if path == "." { error.into_inner().to_string() } else { error.to_string() }
    })
}

/// One of a few words.
pub fn parse_word<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    T::deserialize(Value::Text(text)).map_err(|error| error.to_string())
}

/// Adds `value` at `path`, unless there is something already.
fn insert<'a>(fields: &mut Fields<'a>, path: &'a str, value: Value<'a>) -> bool {
    let (name, rest) = path.split_once('.').map_or((path, None), |(name, rest)| (name, Some(rest)));
    let known = fields.iter_mut().find(|(other, _)| *other == name);
    match (known, rest) {
        (None, None) => {
            fields.push((name, value));
            true
        }
        (None, Some(rest)) => {
            let mut inner = Fields::new();
            insert(&mut inner, rest, value);
            fields.push((name, Value::Fields(inner)));
            true
        }
        (Some((_, Value::Fields(inner))), Some(rest)) => insert(inner, rest, value),
        (Some(_), _) => false,
    }
}

impl<'de> Value<'de> {
    fn number<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self {
            Value::Text(text) => match text.parse() {
                Ok(number) => visitor.visit_u64(number),
                Err(_) => visitor.visit_borrowed_str(text),
            },
            other => other.deserialize_any(visitor),
        }
    }
}

impl<'de> Deserializer<'de> for Value<'de> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self {
            Value::Flag => visitor.visit_bool(true),
            Value::Text(text) => visitor.visit_borrowed_str(text),
            Value::Fields(fields) => visitor.visit_map(MapDeserializer::new(fields.into_iter())),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self {
            Value::Text("true") => visitor.visit_bool(true),
            Value::Text("false") => visitor.visit_bool(false),
            other => other.deserialize_any(visitor),
        }
    }

    fn deserialize_u8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.number(visitor)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.number(visitor)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.number(visitor)
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.number(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self {
            Value::Text(text) => visitor.visit_enum(text.into_deserializer()),
            other => other.deserialize_any(visitor),
        }
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct
        newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

impl<'de> IntoDeserializer<'de, Error> for Value<'de> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

#[cfg(test)]
mod tests {
    use vmm::{DiskConfig, DiskEngine, NetConfig, RateLimitConfig, VhostUse, VsockConfig};

    use super::*;

    #[test]
    fn the_type_of_a_field_says_what_its_text_is() {
        let disk: DiskConfig =
            parse("id=7,path=true,queues=2,read_only=false,direct,engine=io_uring").unwrap();

        let wanted = DiskConfig {
            queues: 2,
            direct: true,
            engine: DiskEngine::IoUring,
            ..DiskConfig::new("7", "true".into())
        };
        assert_eq!(disk, wanted);
    }

    #[test]
    fn a_field_has_fields_of_its_own() {
        let net: NetConfig = parse(
            "receive_limit.bytes_per_second=1000,tap=t,receive_limit.bytes_burst=5,mac=m,vhost=off",
        )
        .unwrap();

        let receive_limit = RateLimitConfig {
            bytes_per_second: Some(1000),
            bytes_burst: Some(5),
            ..RateLimitConfig::default()
        };
        let wanted = NetConfig { receive_limit, vhost: VhostUse::Off, ..NetConfig::new("t", "m") };
        assert_eq!(net, wanted);
    }

    #[test]
    fn a_path_may_contain_what_separates_names_and_values() {
        let vsock: VsockConfig = parse("cid=3,socket=/a.b=c").unwrap();
        assert_eq!(vsock.socket, Some("/a.b=c".into()));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let refused = |text| parse::<DiskConfig>(text).unwrap_err();

        assert_eq!(refused("id=a"), "missing field `path`");
        assert_eq!(refused("id=a,id=b"), "id: must be given once");
        assert_eq!(refused("id.x=a,id=b"), "id: must be given once");
        assert!(refused("idd=a").starts_with("idd: unknown field `idd`"));
        let wrong = "read_only: invalid type: string \"maybe\", expected a boolean";
        assert_eq!(refused("id=a,path=b,read_only=maybe"), wrong);
        let wrong = "queues: invalid type: string \"x\", expected u16";
        assert_eq!(refused("id=a,path=b,queues=x"), wrong);
        let wrong = "id: invalid type: boolean `true`, expected a string";
        assert_eq!(refused("id,path=b"), wrong);
        assert!(refused("id=a,path=b,rate_limit.x=1").starts_with("rate_limit.x: unknown field"));
        assert!(refused("id=a,path=b,engine=x").starts_with("engine: unknown variant `x`"));
    }
}
