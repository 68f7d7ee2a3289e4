//! The unix socket of the socket device, with Coracle's own guest behind it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use vmm::{Exit, VmConfig, Vmm, VsockConfig};

/// Generous, because the lab emulates a processor.
const PATIENCE: Duration = Duration::from_secs(60);

/// The port of the host to which the agent connects when it is ready.
const CONTROL_PORT: u32 = 1024;

/// The port of the guest on which the agent listens then.
const STDIO_PORT: u32 = 1025;

fn path_from(name: &str) -> PathBuf {
    std::env::var_os(name).unwrap_or_else(|| panic!("set {name} to the path of one")).into()
}

/// What the device answers to `CONNECT <port>`; nothing if it hangs up.
fn dial(socket: &PathBuf, port: u32) -> (UnixStream, String) {
    let mut client = UnixStream::connect(socket).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
    let mut answer = String::new();
    BufReader::new(&client).read_line(&mut answer).unwrap();
    (client, answer)
}

#[test]
#[ignore = "needs KVM that boots Linux"]
fn the_guest_and_programs_of_the_host_connect_both_ways() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("v");
    let control = UnixListener::bind(folder.path().join(format!("v_{CONTROL_PORT}"))).unwrap();
    let mut config = VmConfig::new(path_from("CORACLE_TEST_KERNEL"));
    config.boot.initrd = Some(path_from("CORACLE_TEST_INITRD"));
    config.boot.cmdline = "panic=-1".to_owned();
    config.vsock = Some(VsockConfig { cid: 3, socket: Some(socket.clone()) });

    let vm = Vmm::new(config).unwrap().start().unwrap();
    let (mut agent, _) = control.accept().unwrap();
    agent.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut length = [0; 4];
    agent.read_exact(&mut length).unwrap();
    assert_ne!(u32::from_le_bytes(length), 0);

    let streams: Vec<_> = (0..100).map(|_| dial(&socket, STDIO_PORT)).collect();
    assert!(streams.iter().all(|(_, answer)| answer.starts_with("OK ")), "{streams:?}");
    assert_eq!(dial(&socket, 9).1, "");

    let activity = vm.metrics().devices["vsock"];
    assert!(activity.kicks > 100 && activity.chains > 100 && activity.interrupts > 0);
    vm.stop();
    assert_eq!(vm.wait(), Exit::Stopped);
    assert!(!socket.exists());
}
