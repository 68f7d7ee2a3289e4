//! Tests of reading and joining a network namespace, with `ip` and `tc` as witnesses.

use std::process::Command;

use nix::sched::{CloneFlags, unshare};

use super::*;

/// Runs `test` on a thread in a network namespace of its own.
fn in_new_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        test();
    });
    thread.join().unwrap();
}

fn shell(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

const SET_UP: &str = "
    ip link add eth0 address 02:42:ac:11:00:02 mtu 1400 type veth peer name outside
    ip link add ignored type bridge
    ip addr add 172.17.0.2/16 dev eth0
    ip addr add 2001:db8::2/64 dev eth0 nodad
    ip link set outside up
    ip link set eth0 up
    ip route add default via 172.17.0.1
    ip route add 10.0.0.0/8 dev eth0 scope link metric 5
    ip neigh add 172.17.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent
";

#[test]
#[ignore = "needs root"]
fn the_guest_gets_what_the_engine_set_up() {
    in_new_namespace(|| {
        shell(SET_UP);

        let mut network = Network::take().unwrap();

        // Which end of a veth pair an engine leaves in the namespace: here both are.
        network.retain(|link| link.name == "eth0");
        let eth0 = &network.guest.interfaces[0];
        assert_eq!(eth0.mac, [2, 0x42, 0xac, 0x11, 0, 2]);
        assert_eq!(eth0.mtu, 1400);
        let addresses = [
            Address { ip: "172.17.0.2".parse().unwrap(), prefix: 16 },
            Address { ip: "2001:db8::2".parse().unwrap(), prefix: 64 },
        ];
        assert_eq!(eth0.addresses, addresses);
        assert_eq!(network.guest.routes.len(), 2, "{:?}", network.guest.routes);
        assert_eq!(network.guest.routes[0].metric, 5);
        assert!(network.guest.routes[0].on_link);
        assert_eq!(network.guest.routes[1].destination, None);
        assert_eq!(network.guest.routes[1].gateway, Some("172.17.0.1".parse().unwrap()));
        assert_eq!(network.guest.neighbours.len(), 1);
    });
}

#[test]
#[ignore = "needs root"]
fn an_interface_and_its_tap_are_joined_both_ways_and_can_be_joined_again() {
    in_new_namespace(|| {
        shell(SET_UP);
        let network = Network::take().unwrap();
        shell("ip tuntap add tap0 mode tap; ip tuntap add tap1 mode tap");

        network.join().unwrap();
        network.join().unwrap();

        let tap = &network.links.iter().find(|link| link.name == "eth0").unwrap().tap;
        let filters = shell("tc filter show dev eth0 ingress");
        assert_eq!(filters.matches("mirred (Egress Redirect to device").count(), 1, "{filters}");
        assert!(filters.contains(tap.as_str()), "{filters}");
        assert!(shell(&format!("tc filter show dev {tap} ingress")).contains("eth0"));
        assert!(shell(&format!("ip link show {tap}")).contains("mtu 1400"));
        network.part();
        assert_eq!(shell("tc filter show dev eth0 ingress"), "");
    });
}

#[test]
#[ignore = "needs root"]
fn the_namespace_answers_until_the_guest_takes_over() {
    in_new_namespace(|| {
        shell(SET_UP);
        assert!(answers_a_peer("172.17.0.2"));
        while shell("ip -o link").contains("eth0") {
            std::thread::yield_now();
        }
        shell(&SET_UP.replace("ip link add ignored type bridge", ""));
        let network = Network::take().unwrap();
        shell("ip tuntap add tap0 mode tap; ip tuntap add tap1 mode tap");
        network.join().unwrap();

        assert!(!answers_a_peer("172.17.0.2"));
    });
}

/// Whether `address` answers ARP at the other end of `eth0`, in a namespace of its own.
fn answers_a_peer(address: &str) -> bool {
    let mut other = Command::new("unshare").args(["-n", "sleep", "60"]).spawn().unwrap();
    let pid = other.id();
    // The child is in its own namespace once that differs from this thread's.
    let here = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    while std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap() == here {
        std::thread::yield_now();
    }
    shell(&format!("ip link set outside netns {pid}"));
    let connect = format!(
        "ip addr add 172.17.0.1/16 dev outside; ip link set outside up
         bash -c ': < /dev/udp/{address}/9; echo > /dev/udp/{address}/9'; sleep 0.5
         ip neigh show {address} | grep -q lladdr"
    );
    let status = Command::new("nsenter")
        .args(["-t", &pid.to_string(), "-n", "sh", "-c", &connect])
        .output()
        .unwrap()
        .status;
    // The pair goes with its namespace.
    other.kill().unwrap();
    other.wait().unwrap();
    status.success()
}

#[test]
#[ignore = "needs root"]
fn what_a_killed_sandbox_left_is_taken_back_and_what_a_running_one_needs_is_not() {
    in_new_namespace(|| {
        shell(SET_UP);
        let network = Network::take().unwrap();
        shell("ip tuntap add tap0 mode tap; ip tuntap add tap1 mode tap");
        network.join().unwrap();
        let path = format!("/proc/{}/task/{}/ns/net", std::process::id(), nix::unistd::gettid());

        tidy(Path::new(&path));
        assert!(shell("tc qdisc show dev eth0").contains("ingress"));

        shell("ip link del tap0; ip link del tap1");
        tidy(Path::new(&path));
        assert!(!shell("tc qdisc show dev eth0").contains("ingress"));
    });
}

#[test]
#[ignore = "needs root"]
fn a_link_that_comes_later_gets_a_tap_and_the_others_keep_theirs() {
    in_new_namespace(|| {
        shell("ip link add eth0 type veth peer name eth1");
        let former = Network::take().unwrap();
        shell("ip link add eth2 type veth peer name eth3; ip link set eth2 up");

        let network = Network::read_after(&former, &["tap7".to_owned()]).unwrap();

        // `eth3` is not up.
        let taps: Vec<_> =
            network.links.iter().map(|link| (&link.name[..], &link.tap[..])).collect();
        let named = |name: &str| taps.iter().find(|(other, _)| *other == name).map(|(_, tap)| *tap);
        let before = |name: &str| former.links.iter().find(|link| link.name == name).unwrap();
        assert_eq!(named("eth0"), Some(&before("eth0").tap[..]));
        assert_eq!(named("eth1"), Some(&before("eth1").tap[..]));
        assert_eq!((named("eth2"), named("eth3")), (Some("tap7"), None));
    });
}

#[test]
#[ignore = "needs root"]
fn a_tap_with_an_address_is_an_engine_s_and_one_without_a_machine_s() {
    in_new_namespace(|| {
        shell("ip tuntap add tap0 mode tap; ip addr add 10.0.2.100/24 dev tap0");
        let network = Network::take().unwrap();
        let links: Vec<_> =
            network.links.iter().map(|link| (&link.name[..], &link.tap[..])).collect();
        assert_eq!(links, [("tap0", "tap1")]);

        shell("ip tuntap add tap1 mode tap");
        assert!(matches!(Network::take(), Err(Error::Taken)));
    });
}

#[test]
fn an_empty_namespace_gives_an_empty_network() {
    assert!(links(&[], &[]).is_empty());
}

#[test]
fn hardware_addresses_are_written_as_the_vmm_reads_them() {
    assert_eq!(mac_text([2, 0, 0xab, 0, 0, 1]), "02:00:ab:00:00:01");
}
