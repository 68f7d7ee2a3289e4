//! The requests of the control socket that change what a running machine has: vCPUs, memory, disks and
//! network interfaces.

use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vmm::balloon::Statistics;
use vmm::{
    AttachError, Attachment, ConfigError, DetachError, DiskConfig, GrantError, NetConfig, Opened,
    VmHandle, from_json,
};

use crate::http::{Request, Response};
use crate::machine::{Machine, State};

/// How long the guest may take to tell how it uses its memory, while other clients wait.
const STATISTICS_PATIENCE: Duration = Duration::from_millis(500);

/// The field of a refusal that is about all of a document.
const DOCUMENT: &str = "(document)";

/// The collections whose members come and go.
const DISKS: &str = "/v1/vm/disks";
const NETS: &str = "/v1/vm/nets";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Processors {
    count: u8,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Memory {
    pluggable_mib: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Balloon {
    target_mib: u32,
}

#[derive(Serialize)]
struct Place {
    number: usize,
    names: Vec<String>,
}

/// The field of `request` that names something to open, if one does.
pub fn opened_field(request: &Request) -> Option<&'static str> {
    match (&*request.method, &*request.path) {
        ("POST", DISKS) => Some("path"),
        ("POST", NETS) => Some("tap"),
        _ => None,
    }
}

/// Opens what `field` of `request` names, for who carries it out.
pub fn open_for(request: &Request, field: &str) -> Result<Opened, ConfigError> {
    let opened = match &*request.path {
        DISKS => Opened::disk(&from_json(text(&request.body)?)?),
        _ => Opened::net(&from_json(text(&request.body)?)?),
    };
    opened.map_err(|error| match error {
        AttachError::Config(error) => error,
        // What the client named cannot be used.
        AttachError::Open(error) => ConfigError { field: field.to_owned(), rule: chain(*error) },
        error => ConfigError { field: DOCUMENT.to_owned(), rule: chain(error) },
    })
}

/// Does what `request` asks of `machine`, with what was `opened` for it; `None` if its path is none of
/// these.
pub fn answer(
    machine: &mut Machine,
    request: &Request,
    opened: Result<Opened, ConfigError>,
) -> Option<Response> {
    let (method, path) = (&*request.method, &*request.path);
    let outcome = match (path, method) {
        ("/v1/vm/vcpus", "GET") => processors(machine),
        ("/v1/vm/vcpus", "PUT") => grant(machine, &request.body),
        ("/v1/vm/memory", "GET") => memory(machine),
        ("/v1/vm/memory", "PUT") => plug(machine, &request.body),
        ("/v1/vm/balloon", "GET") => balloon(machine),
        ("/v1/vm/balloon", "PUT") => inflate(machine, &request.body),
        ("/v1/vm/vcpus" | "/v1/vm/memory" | "/v1/vm/balloon", _) => {
            Ok(Response::wrong_method("GET, PUT"))
        }
        (DISKS, "POST") => attach_disk(machine, &request.body, opened),
        (NETS, "POST") => attach_net(machine, &request.body, opened),
        (DISKS | NETS, _) => Ok(Response::wrong_method("POST")),
        _ => {
            let member = |collection| path.strip_prefix(collection)?.strip_prefix('/');
            match (member(DISKS), member(NETS)) {
                (Some(id), _) if method == "DELETE" => detach_disk(machine, id),
                (_, Some(tap)) if method == "DELETE" => detach_net(machine, tap),
                (None, None) => return None,
                _ => Ok(Response::wrong_method("DELETE")),
            }
        }
    };
    Some(outcome.unwrap_or_else(|refusal| refusal))
}

/// An answer, or one that says why not.
type Outcome = Result<Response, Response>;

fn text(body: &[u8]) -> Result<&str, ConfigError> {
    let refused = |_| ConfigError { field: DOCUMENT.to_owned(), rule: "must be UTF-8".to_owned() };
    std::str::from_utf8(body).map_err(refused)
}

fn parse<T: DeserializeOwned + Serialize>(body: &[u8]) -> Result<T, Response> {
    let parsed = text(body).and_then(from_json);
    parsed.map_err(|error| Response::failure(400, &error.field, &error.rule))
}

/// The machine while its guest runs or stands still.
fn started(machine: &Machine) -> Result<&VmHandle, Response> {
    machine.handle().ok_or_else(|| wrong_state(machine, "running or paused"))
}

/// The machine while its guest runs: what is attached to a paused one may not be noticed.
fn running(machine: &Machine) -> Result<&VmHandle, Response> {
    let handle = machine.handle().filter(|_| machine.state() == State::Running);
    handle.ok_or_else(|| wrong_state(machine, "running"))
}

fn wrong_state(machine: &Machine, needed: &str) -> Response {
    let rule = format!("must be {needed}, and the machine is {}", machine.state());
    Response::failure(409, "state", &rule)
}

fn processors(machine: &Machine) -> Outcome {
    let (granted, most) = (started(machine)?.vcpus(), machine.config().most_vcpus());
    Ok(Response::json(&json!({ "count": granted, "max_vcpus": most })))
}

fn grant(machine: &mut Machine, body: &[u8]) -> Outcome {
    let vm = started(machine)?;
    let Processors { count } = parse(body)?;
    let outcome = vm.grant_vcpus(count);
    // Some may be there where not all could be.
    machine.config_mut().vcpus = vm.vcpus();
    outcome.map_err(|error| {
        let status = if matches!(error, GrantError::Count { .. }) { 400 } else { 500 };
        Response::failure(status, "count", &chain(error))
    })?;
    processors(machine)
}

fn memory(machine: &Machine) -> Outcome {
    let plug = started(machine)?.pluggable_memory();
    Ok(Response::json(&json!({
        "size_mib": machine.config().memory.size_mib,
        "max_pluggable_mib": machine.config().memory.pluggable_mib,
        "pluggable_mib": plug.map_or(0, |plug| plug.requested_mib()),
        "plugged_mib": plug.map_or(0, |plug| plug.plugged_mib()),
    })))
}

fn plug(machine: &Machine, body: &[u8]) -> Outcome {
    let vm = started(machine)?;
    let Memory { pluggable_mib } = parse(body)?;
    let Some(plug) = vm.pluggable_memory() else {
        let rule = "must be 0: the machine was built with memory.pluggable_mib = 0";
        return Err(Response::failure(409, "pluggable_mib", rule));
    };
    plug.request_mib(pluggable_mib)
        .map_err(|error| Response::failure(400, "pluggable_mib", &error.to_string()))?;
    memory(machine)
}

fn inflate(machine: &Machine, body: &[u8]) -> Outcome {
    let vm = started(machine)?;
    let Balloon { target_mib } = parse(body)?;
    let Some(balloon) = vm.balloon() else { return Err(no_balloon()) };
    let most = machine.config().memory.size_mib - 1;
    if target_mib > most {
        let rule = format!("must be 0 to {most}, not {target_mib}");
        return Err(Response::failure(400, "target_mib", &rule));
    }
    balloon.set_target_mib(target_mib);
    Ok(Response::done())
}

fn balloon(machine: &Machine) -> Outcome {
    let Some(balloon) = started(machine)?.balloon() else { return Err(no_balloon()) };
    // A guest that stands still tells nothing.
    let patience = match machine.state() {
        State::Running => STATISTICS_PATIENCE,
        _ => Duration::ZERO,
    };
    // A guest that breaks its ring tells nothing either.
    let statistics = balloon.statistics(patience).ok().flatten();
    Ok(Response::json(&json!({
        "target_mib": balloon.target_mib(),
        "size_mib": balloon.size_mib(),
        "given_back_bytes": balloon.given_back_bytes(),
        "statistics": statistics.as_ref().map(described),
    })))
}

fn described(statistics: &Statistics) -> Value {
    json!({
        "swapped_in_bytes": statistics.swapped_in_bytes,
        "swapped_out_bytes": statistics.swapped_out_bytes,
        "major_faults": statistics.major_faults,
        "minor_faults": statistics.minor_faults,
        "free_bytes": statistics.free_bytes,
        "total_bytes": statistics.total_bytes,
        "available_bytes": statistics.available_bytes,
        "cached_bytes": statistics.cached_bytes,
        "huge_pages": statistics.huge_pages,
        "huge_page_failures": statistics.huge_page_failures,
    })
}

fn no_balloon() -> Response {
    Response::failure(409, "balloon", "must be in the machine, which was built without one")
}

fn attach_disk(machine: &mut Machine, body: &[u8], opened: Result<Opened, ConfigError>) -> Outcome {
    let vm = running(machine)?;
    let disk: DiskConfig = parse(body)?;
    let place = vm.attach_opened_disk(&disk, opened).map_err(not_attached)?;
    machine.config_mut().disks.push(disk);
    Ok(attached(place))
}

fn attach_net(machine: &mut Machine, body: &[u8], opened: Result<Opened, ConfigError>) -> Outcome {
    let vm = running(machine)?;
    let net: NetConfig = parse(body)?;
    // The same tap is another matter, and an address that is none as well.
    let has_its_mac = |other: &NetConfig| {
        other.tap != net.tap && net.mac_bytes().is_some_and(|mac| other.mac_bytes() == Some(mac))
    };
    if machine.config().nets.iter().any(has_its_mac) {
        let rule = format!("must be another one: an interface has {:?} already", net.mac);
        return Err(Response::failure(400, "mac", &rule));
    }
    let place = vm.attach_opened_net(&net, opened).map_err(not_attached)?;
    machine.config_mut().nets.push(net);
    Ok(attached(place))
}

fn detach_disk(machine: &mut Machine, id: &str) -> Outcome {
    running(machine)?.detach_disk(id).map_err(|error| not_detached("id", &error))?;
    machine.config_mut().disks.retain(|disk| disk.id != id);
    Ok(Response::done())
}

fn detach_net(machine: &mut Machine, tap: &str) -> Outcome {
    running(machine)?.detach_net(tap).map_err(|error| not_detached("tap", &error))?;
    machine.config_mut().nets.retain(|net| net.tap != tap);
    Ok(Response::done())
}

fn attached(place: Attachment) -> Response {
    let Attachment { number, names } = place;
    Response { status: 201, ..Response::json(&Place { number, names }) }
}

/// The answer where no device was attached.
fn not_attached(error: AttachError) -> Response {
    match error {
        AttachError::Config(error) => Response::failure(400, &error.field, &error.rule),
        AttachError::NoSlot { .. } => Response::failure(409, "spare_slots", &error.to_string()),
        AttachError::Open(_) | AttachError::Connect(_) | AttachError::Serve(_) => {
            Response::failure(500, DOCUMENT, &chain(error))
        }
    }
}

fn not_detached(field: &str, error: &DetachError) -> Response {
    let status = if matches!(error, DetachError::Unknown(_)) { 404 } else { 409 };
    Response::failure(status, field, &error.to_string())
}

fn chain(error: impl std::error::Error + Send + Sync + 'static) -> String {
    format!("{:#}", anyhow::Error::from(error))
}
