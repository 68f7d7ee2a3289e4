//! The requests of the control socket, version 1 (API.md): which there are, and what they do.

use serde::{Deserialize, Serialize};
use vmm::{ConfigError, Opened, VmConfig, from_json, prometheus};

use crate::http::{Request, Response};
use crate::machine::{Error, Machine, State};
use crate::resources;

const PATHS: &str = "must be /v1/vm, /v1/vm/{state,vcpus,memory,balloon,disks,nets}, /v1/metrics or \
                     /metrics";

#[derive(Serialize)]
struct Vm<'a> {
    state: State,
    config: &'a VmConfig,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StateChange {
    state: Wanted,
}

/// The states a client can ask for.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Wanted {
    Running,
    Paused,
    Stopped,
}

/// Does what `request` asks of `machine`, with what was `opened` for it.
pub fn answer(
    machine: &mut Machine,
    request: &Request,
    opened: Result<Opened, ConfigError>,
) -> Response {
    let is_get = request.method == "GET";
    match &*request.path {
        "/v1/vm/state" if request.method == "PUT" => change_state(machine, &request.body),
        "/v1/vm/state" => Response::wrong_method("PUT"),
        "/v1/vm" if is_get => {
            Response::json(&Vm { state: machine.state(), config: machine.config() })
        }
        "/v1/metrics" if is_get => Response::json(&machine.metrics()),
        "/metrics" if is_get => {
            Response::text(prometheus::CONTENT_TYPE, machine.metrics().to_prometheus())
        }
        "/v1/vm" | "/v1/metrics" | "/metrics" => Response::wrong_method("GET"),
        _ => resources::answer(machine, request, opened)
            .unwrap_or_else(|| Response::failure(404, "path", PATHS)),
    }
}

fn change_state(machine: &mut Machine, body: &[u8]) -> Response {
    let Ok(text) = std::str::from_utf8(body) else {
        return Response::failure(400, "(document)", "must be UTF-8");
    };
    let wanted = match from_json::<StateChange>(text) {
        Ok(StateChange { state: Wanted::Running }) => State::Running,
        Ok(StateChange { state: Wanted::Paused }) => State::Paused,
        Ok(StateChange { state: Wanted::Stopped }) => State::Stopped,
        Err(error) => return Response::failure(400, &error.field, &error.rule),
    };
    match machine.become_state(wanted) {
        Ok(()) => Response::done(),
        Err(error @ Error::State(_)) => Response::failure(409, "state", &error.to_string()),
        Err(error @ Error::Start(_)) => Response::failure(500, "state", &error.to_string()),
        Err(error @ Error::Busy) => Response::failure(503, "state", &error.to_string()),
    }
}
