//! systemd as the first process.

use tests::shell;

use crate::{System, assert_nothing_left, within};

/// Where Debian's disk is mounted.
const DEBIAN: &str = "/run/lab/debian";

/// How long an emulated guest may take to start all services, in seconds.
const BOOT_S: u32 = 400;

/// An image of a Debian. Its /usr is left out and to be bound from the disk: importing it would take
/// longer than all of the test. So is what belongs to the machine that the disk is made for.
fn import() {
    shell(&format!(
        "mkdir -p {DEBIAN}; mountpoint -q {DEBIAN} || \
           mount -o loop,ro $CORACLE_TEST_DEBIAN/root.ext4 {DEBIAN}; \
         tar -C {DEBIAN} --exclude=./usr --exclude=./boot --exclude=./var/lib/dpkg \
           --exclude=./etc/fstab --exclude=./etc/systemd/network/lab.network -c . | \
         docker import --change 'CMD [\"/sbin/init\"]' - debian"
    ));
}

#[test]
#[ignore = "needs the lab: Docker, KVM and a Debian"]
fn systemd_starts_all_services_and_ends_when_it_is_stopped() {
    import();
    // As people run it: the cgroups are given to it, and it is stopped by its own signal.
    let system = System::start(
        "systemd",
        &format!(
            "--tmpfs /run --tmpfs /run/lock -v /sys/fs/cgroup:/sys/fs/cgroup --cgroupns host \
             --stop-signal SIGRTMIN+3 -v {DEBIAN}/usr:/usr:ro debian"
        ),
    );

    let state = within(
        BOOT_S,
        "until docker exec systemd test -S /run/systemd/private; do sleep 2; done; \
         docker exec systemd systemctl is-system-running --wait || \
         docker exec systemd systemctl --failed --no-legend",
    );
    let units = system
        .exec("systemctl is-active multi-user.target dbus systemd-journald; cat /proc/1/comm");
    let stopped = shell("docker stop -t 200 systemd");

    assert_eq!(state.stdout, "running\n");
    assert_eq!(units.stdout, "active\nactive\nactive\nsystemd\n", "{units:?}");
    assert_eq!(stopped.code, 0, "{stopped:?}");
    // Its last act is reboot(2), which in a container of any runtime is the signal INT.
    assert_eq!(system.inspect("{{.State.Status}} {{.State.ExitCode}}"), "exited 130");
    drop(system);
    shell(&format!("umount {DEBIAN}; docker rmi debian"));
    assert_nothing_left();
}
