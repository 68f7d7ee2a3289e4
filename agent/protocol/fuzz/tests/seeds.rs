//! Every seed, and every input that ever found something, is played without a fuzzer.

use std::fs;
use std::path::{Path, PathBuf};

use agent_protocol::frame::encode;
use agent_protocol::{Event, ExitStatus, Failed, Message, Request, Response};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds/frame")
}

/// Frames that are right, one after the other, and one that is cut short.
fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let event = |event| encode(&Message::Event(event)).unwrap();
    let response = |response| encode(&Message::Response(response)).unwrap();
    let ready =
        event(Event::Ready { version: 1, kernel: "6.12".into(), started_us: 5, uptime_us: 7 });
    let failed = Failed { message: "exec: no".into(), errno: 2 };
    let messages = [
        ready.clone(),
        response(Response::Created { pid: 7 }),
        response(Response::Failed(failed)),
        response(Response::Done),
        event(Event::Exited {
            container: "c".into(),
            process: String::new(),
            status: ExitStatus::Code(3),
        }),
    ];
    let signal =
        Request::Signal { container: "c".into(), process: "p".into(), signal: 15, all: true };
    vec![
        ("messages", messages.concat()),
        ("cut_short", ready[..ready.len() - 1].to_vec()),
        ("request", encode(&signal).unwrap()),
        ("too_large", vec![0xff; 8]),
    ]
}

#[test]
fn every_frame_is_survived() {
    for entry in fs::read_dir(folder()).unwrap() {
        let seed = entry.unwrap().path();
        // The name of one that fails is the last line.
        eprintln!("{}", seed.display());
        agent_protocol_fuzz::frame(&fs::read(seed).unwrap());
    }
}

#[test]
fn the_files_are_the_seeds() {
    for (name, bytes) in seeds() {
        assert!(fs::read(folder().join(name)).ok() == Some(bytes), "{name} is not what it was");
    }
}

#[test]
#[ignore = "writes the files that the_files_are_the_seeds reads"]
fn write_the_seeds() {
    fs::create_dir_all(folder()).unwrap();
    for (name, bytes) in seeds() {
        fs::write(folder().join(name), bytes).unwrap();
    }
}
