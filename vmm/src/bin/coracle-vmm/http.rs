//! HTTP/1.1 on a unix socket, for a few clients that ask little: requests parsed from bytes, and
//! answers as bytes (RFC 9112).

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// Most bytes of a request line with its header fields.
pub const MAX_HEAD_BYTES: usize = 8 << 10;

/// Most bytes of a body.
pub const MAX_BODY_BYTES: usize = 64 << 10;

/// Most header fields of a request.
const MAX_FIELDS: usize = 32;

/// The type of most answers.
const JSON: Cow<'static, str> = Cow::Borrowed("application/json");

/// A whole request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// `GET` and so on, as the client wrote it; `GET` for a `HEAD`.
    pub method: String,
    /// It is a `HEAD`: the client wants the answer's head only (RFC 9110, section 9.3.2).
    pub is_head: bool,
    /// Where it goes, with everything behind the host.
    pub path: String,
    /// What it says.
    pub body: Vec<u8>,
    /// The client wants nothing after the answer.
    pub is_last: bool,
}

/// An answer.
#[derive(Debug, Serialize, Deserialize)]
pub struct Response {
    /// The status code (RFC 9110, section 15).
    pub status: u16,
    /// Methods the path knows, for an answer that says the method is wrong.
    pub allow: Option<Cow<'static, str>>,
    /// Type of the body.
    pub content_type: Cow<'static, str>,
    /// The body.
    pub body: String,
}

#[derive(Serialize)]
struct Failure<'a> {
    error: Reason<'a>,
}

#[derive(Serialize)]
struct Reason<'a> {
    field: &'a str,
    rule: &'a str,
}

impl Request {
    /// Takes the first request off `received`; `None` if it is not there in full. An error is the
    /// answer to bytes that no request can follow.
    pub fn take(received: &mut Vec<u8>) -> Result<Option<Request>, Response> {
        let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
        let mut head = httparse::Request::new(&mut fields);
        let head_bytes = match head.parse(received) {
            Ok(httparse::Status::Complete(bytes)) if bytes <= MAX_HEAD_BYTES => bytes,
            Ok(httparse::Status::Partial) if received.len() <= MAX_HEAD_BYTES => return Ok(None),
            Ok(_) => {
                let rule = format!("must have at most {MAX_HEAD_BYTES} bytes");
                return Err(Response::failure(431, "(head)", &rule));
            }
            Err(error) => return Err(Response::failure(400, "(head)", &error.to_string())),
        };
        let body_bytes = body_bytes(head.headers)?;
        let Some(body) = received.get(head_bytes..head_bytes + body_bytes) else {
            return Ok(None);
        };
        let says_close = |field: &httparse::Header<'_>| {
            field.name.eq_ignore_ascii_case("connection")
                && field.value.eq_ignore_ascii_case(b"close")
        };
        let method = head.method.unwrap_or_default();
        let is_head = method == "HEAD";
        let request = Request {
            method: if is_head { "GET" } else { method }.to_owned(),
            is_head,
            path: head.path.unwrap_or_default().to_owned(),
            body: body.to_vec(),
            is_last: head.version == Some(0) || head.headers.iter().any(says_close),
        };
        received.drain(..head_bytes + body_bytes);
        Ok(Some(request))
    }
}

fn body_bytes(fields: &[httparse::Header<'_>]) -> Result<usize, Response> {
    let refuse = |status, rule: &str| Err(Response::failure(status, "content-length", rule));
    let mut length = None;
    for field in fields {
        if field.name.eq_ignore_ascii_case("transfer-encoding") {
            return refuse(411, "must be given, as no transfer coding is known");
        }
        if field.name.eq_ignore_ascii_case("content-length") {
            let value = std::str::from_utf8(field.value).ok();
            let number = value.filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
            let Some(bytes) = number.and_then(|text| text.parse::<usize>().ok()) else {
                return refuse(400, "must be a number");
            };
            if length.replace(bytes).is_some_and(|other| other != bytes) {
                return refuse(400, "must be given once");
            }
        }
    }
    let length = length.unwrap_or(0);
    if length > MAX_BODY_BYTES {
        return refuse(413, &format!("must be at most {MAX_BODY_BYTES}"));
    }
    Ok(length)
}

impl Response {
    /// It is done, and there is nothing to say.
    pub fn done() -> Self {
        Response { status: 204, allow: None, content_type: JSON, body: String::new() }
    }

    /// An answer of text.
    pub fn text(content_type: &'static str, body: String) -> Self {
        Response { status: 200, allow: None, content_type: content_type.into(), body }
    }

    /// `value` as JSON.
    pub fn json(value: &impl Serialize) -> Self {
        match serde_json::to_string(value) {
            Ok(body) => Response { body, status: 200, ..Response::done() },
            Err(error) => Response::failure(500, "(answer)", &error.to_string()),
        }
    }

    /// A refusal: which field of the request, and the rule it breaks.
    pub fn failure(status: u16, field: &str, rule: &str) -> Self {
        let body = serde_json::to_string(&Failure { error: Reason { field, rule } })
            .expect("two strings are JSON");
        Response { status, allow: None, content_type: JSON, body }
    }

    /// The method is wrong: the path knows only `allow`.
    pub fn wrong_method(allow: &'static str) -> Self {
        let failure = Response::failure(405, "method", &format!("must be {allow}"));
        Response { allow: Some(allow.into()), ..failure }
    }

    /// As it goes over the socket; `is_last` tells the client that nothing follows.
    pub fn encode(&self, is_last: bool) -> String {
        self.head(is_last) + &self.body
    }

    /// The same without its body.
    pub fn head(&self, is_last: bool) -> String {
        let Response { status, body, .. } = self;
        let mut text = format!("HTTP/1.1 {status} {}\r\n", reason(*status));
        if *status != 204 {
            let length = body.len();
            text += &format!("Content-Type: {}\r\nContent-Length: {length}\r\n", self.content_type);
        }
        if let Some(allow) = &self.allow {
            text += &format!("Allow: {allow}\r\n");
        }
        if is_last {
            text += "Connection: close\r\n";
        }
        text + "\r\n"
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        204 => "No Content",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        411 => "Length Required",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(text: &str) -> Result<Option<Request>, u16> {
        Request::take(&mut text.into()).map_err(|response| response.status)
    }

    #[test]
    fn a_request_is_taken_once_its_body_is_there() {
        let whole = "PUT /v1 HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbodyGET";
        let mut received = whole.as_bytes().to_vec();

        for length in 0..whole.len() - 3 {
            assert_eq!(take(&whole[..length]), Ok(None));
        }
        let request = Request::take(&mut received).unwrap().unwrap();

        assert_eq!((&*request.method, &*request.path), ("PUT", "/v1"));
        assert_eq!((&*request.body, request.is_last), (&b"body"[..], false));
        assert_eq!(received, b"GET");
    }

    #[test]
    fn a_client_that_says_close_gets_one_answer() {
        let request = take("GET / HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap().unwrap();

        assert!(request.is_last);
    }

    #[test]
    fn heads_and_bodies_without_end_are_refused() {
        let endless = format!("GET /{} HTTP/1.1\r\n", "a".repeat(MAX_HEAD_BYTES));
        assert_eq!(take(&endless), Err(431));
        assert_eq!(take("PUT / HTTP/1.1\r\nContent-Length: 65537\r\n\r\n"), Err(413));
        assert_eq!(take("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"), Err(411));
    }

    #[test]
    fn what_is_no_http_is_refused() {
        for text in ["\0\0\0\0", "GET / HTTP/1.1\r\nContent-Length: +1\r\n\r\n"] {
            assert_eq!(take(text), Err(400), "{text:?}");
        }
        let twice = "GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n";
        assert_eq!(take(twice), Err(400));
    }

    #[test]
    fn a_failure_names_field_and_rule() {
        let text = Response::failure(409, "state", "must be \"running\"").encode(true);

        let expected = "HTTP/1.1 409 Conflict\r\nContent-Type: application/json\r\n\
                        Content-Length: 56\r\nConnection: close\r\n\r\n\
                        {\"error\":{\"field\":\"state\",\"rule\":\"must be \\\"running\\\"\"}}";
        assert_eq!(text, expected);
    }
}
