//! The life of a VM, shown with guests of a few instructions that any KVM can run.

#[path = "payload/driver.rs"]
mod driver;
mod payload;

use std::path::Path;
use std::time::{Duration, Instant};

use arch::Kvm;
use arch::payload::DEVICES;
use driver::Driver;
use kvm_ioctls::Cap;
use payload::{END, HANG, Payload, end, print, print_alphabet_for_ever, reach_devices};
use tempfile::{NamedTempFile, TempDir};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS;
use vmm::{
    ConsoleOutput, DiskConfig, Error, Exit, MemoryBacking, NetConfig, SavedMemory, ShareConfig,
    Sharing, VhostUse, VmConfig, VmHandle, Vmm, VsockConfig,
};

/// Generous, because this machine may be busy and its KVM emulated.
const PATIENCE: Duration = Duration::from_secs(60);

fn start(config: VmConfig) -> VmHandle {
    Vmm::new(config).unwrap().start().unwrap()
}

fn wait_for_output(vm: &VmHandle, wanted: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !vm.console_tail().contains(wanted) {
        assert!(Instant::now() < deadline, "the guest printed {:?}", vm.console_tail());
        std::thread::yield_now();
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_guest_prints_and_ends() {
    let payload = Payload::of(&[print("hello"), END.to_vec()]);

    let vm = start(payload.config());
    wait_for_output(&vm, "hello");

    assert_eq!(vm.wait(), end());
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_guest_that_computes_for_ever_is_stopped() {
    let payload = Payload::of(&[print("up"), HANG.to_vec()]);
    let vm = start(payload.config());
    wait_for_output(&vm, "up");

    vm.stop();

    assert_eq!(vm.wait(), Exit::Stopped);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_guest_that_never_started_to_print_is_stopped() {
    let payload = Payload::of(&[HANG.to_vec()]);
    let vm = start(payload.config());

    vm.stop();

    assert_eq!(vm.wait(), Exit::Stopped);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_paused_guest_does_nothing_until_it_is_resumed() {
    let payload = Payload::of(&[payload::print_for_ever(b'x')]);
    let vm = start(payload.config());
    wait_for_output(&vm, "x");

    vm.pause();
    let paused = vm.metrics().exits;
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(vm.metrics().exits, paused);
    vm.resume();

    let deadline = Instant::now() + PATIENCE;
    while vm.metrics().exits.writes == paused.writes {
        assert!(Instant::now() < deadline, "the guest does not go on");
        std::thread::yield_now();
    }
    vm.stop();
    assert_eq!(vm.wait(), Exit::Stopped);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_paused_guest_can_be_stopped() {
    let payload = Payload::of(&[HANG.to_vec()]);
    let vm = start(payload.config());

    vm.pause();
    vm.stop();

    assert_eq!(vm.wait(), Exit::Stopped);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn the_vcpus_of_a_group_stop_together() {
    let payload = Payload::of(&[print("up"), HANG.to_vec()]);
    let mut config = payload.config();
    config.vcpus = 4;
    let vm = start(config);
    wait_for_output(&vm, "up");

    vm.pause();
    vm.resume();
    vm.stop();

    assert_eq!(vm.wait(), Exit::Stopped);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn exits_are_counted_by_address() {
    let payload = Payload::of(&[print("four"), END.to_vec()]);
    let vm = start(payload.config());
    wait_for_output(&vm, "four");

    let exits = vm.metrics().exits;

    assert_eq!(exits.by_address[payload::UART], 4);
    assert_eq!(vm.wait(), end());
}

#[test]
#[ignore = "needs /dev/kvm"]
fn the_registers_of_a_device_are_written_with_an_exit_and_read_without() {
    let driver = Driver { index: 0, queue: 0 };
    let payload = Payload::of(&[reach_devices(), driver.acknowledge(), END.to_vec()]);
    let vm = start(payload.config());
    wait_for_output(&vm, "11");

    let exits = vm.metrics().exits;

    let reads = if Kvm::new().unwrap().check_extension(Cap::ReadonlyMem) { 0 } else { 2 };
    let status = format!("memory {:#x}", DEVICES + VIRTIO_MMIO_STATUS);
    assert_eq!(exits.by_address[&status], 1 + reads);
    assert_eq!(vm.wait(), end());
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_dropped_vm_leaves_no_thread() {
    let payload = Payload::of(&[HANG.to_vec()]);
    let mut config = payload.config();
    config.vcpus = 10;
    let vm = start(config);

    drop(vm);

    let names = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok());
    // Other tests of this process have VMs of their own, but none with ten vCPUs.
    assert!(names.into_iter().all(|name| name.trim() != "vcpu 9"));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_text_file_is_no_kernel() {
    let file = NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "#!/bin/sh\necho not a kernel\n").unwrap();

    let error = anyhow::Error::from(Vmm::new(VmConfig::new(file.path().into())).err().unwrap());

    let message = format!("{error:#}");
    assert!(message.starts_with("load kernel"), "{message}");
    assert!(message.contains("not a kernel"), "{message}");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_machine_that_is_not_built_leaves_no_file_for_its_memory() {
    let (folder, text) = (TempDir::new().unwrap(), NamedTempFile::new().unwrap());
    let path = folder.path().join("memory");
    let with_memory = |kernel: &Path| {
        let mut config = VmConfig::new(kernel.to_owned());
        config.memory.backing = MemoryBacking::File(path.clone());
        config
    };

    assert!(Vmm::new(with_memory(text.path())).is_err());

    assert!(!path.exists());
    let payload = Payload::of(&[END.to_vec()]);
    Vmm::new(with_memory(&payload.config().boot.kernel)).unwrap();
    // It is another machine's now.
    assert!(Vmm::new(with_memory(&payload.config().boot.kernel)).is_err());
    assert!(path.exists());
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_tap_that_does_not_exist_is_an_error_and_hurts_no_other_machine() {
    let running = Payload::of(&[HANG.to_vec()]);
    let vm = start(running.config());
    let payload = Payload::of(&[END.to_vec()]);
    let mut config = payload.config();
    config.nets = vec![NetConfig::new("coracle-none", "02:00:00:00:00:01")];

    let error = Vmm::new(config).err().unwrap();

    let Error::Config(refused) = error else { panic!("{error:?}") };
    assert_eq!(refused.field, "nets[0].tap");
    assert!(refused.rule.starts_with("must name a tap"), "{}", refused.rule);
    vm.stop();
    assert_eq!(vm.wait(), Exit::Stopped);
}

#[test]
#[ignore = "needs /dev/kvm and taps"]
fn a_guest_that_breaks_every_device_can_reset_and_use_each() {
    let disk = NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let share = TempDir::new().unwrap();
    // In the order of their windows: console, entropy, socket, disk, share, network.
    let queues = [1, 0, 1, 0, 1, 1];
    let mut code = vec![reach_devices()];
    for (index, queue) in (0..).zip(queues) {
        let driver = Driver { index, queue };
        code.extend([driver.jump(), print("j"), driver.offer_no_descriptor(), print("d")]);
        code.extend([driver.start_nowhere(), print("n"), driver.kick_and_kick(), print("k")]);
        code.extend([driver.behave(), print("ok ")]);
    }
    let payload = Payload::of(&[code.concat(), print("end"), END.to_vec()]);
    let mut config = payload.config();
    config.vsock = Some(VsockConfig { cid: 3, socket: None });
    config.disks = vec![DiskConfig::new("disk", disk.path().into())];
    config.shares = vec![ShareConfig::new("t", share.path().into())];
    let net = NetConfig::new("coracle-hostile", "02:00:00:00:00:01");
    config.nets = vec![NetConfig { create: true, vhost: VhostUse::Off, ..net }];

    let vm = start(config);
    wait_for_output(&vm, "end");

    assert_eq!(vm.console_tail(), "jdnkok jdnkok jdnkok jdnkok jdnkok jdnkok end");
    assert_eq!(vm.wait(), end());
}

/// What the machines of one guest printed, one after the other.
fn printed(file: &NamedTempFile) -> String {
    std::fs::read_to_string(file.path()).unwrap()
}

/// A machine that prints into `output`, with its memory in a file.
fn kept(payload: &Payload, output: &NamedTempFile) -> VmConfig {
    let mut config = payload.config();
    config.console.output = ConsoleOutput::File(output.path().to_owned());
    config.memory.backing = MemoryBacking::Memfd;
    config
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_machine_built_anew_prints_on_where_the_saved_one_stopped() {
    let output = NamedTempFile::new().unwrap();
    let payload = Payload::of(&[print_alphabet_for_ever()]);
    let config = kept(&payload, &output);
    let mut vm = start(config.clone());
    wait_for_output(&vm, "xyz");

    for _ in 0..3 {
        vm.pause();
        let state = postcard::to_stdvec(&vm.save().unwrap()).unwrap();
        let file = vm.memory_file().unwrap().try_clone().unwrap();
        drop(vm);
        let memory = SavedMemory { file, sharing: Sharing::Shared };
        let state = postcard::from_bytes(&state).unwrap();
        vm = Vmm::restore(config.clone(), &state, memory).unwrap().start().unwrap();
        wait_for_output(&vm, "xyz");
    }
    vm.stop();
    assert_eq!(vm.wait(), Exit::Stopped);

    let printed = printed(&output);
    let alphabet = ('a'..='z').cycle();
    assert!(printed.len() > 4 * 26);
    assert!(printed.chars().zip(alphabet).all(|(printed, expected)| printed == expected));
}

/// A register write that costs no exit waits outside the device, and is a part of what is saved.
#[test]
#[ignore = "needs /dev/kvm"]
fn a_register_that_was_written_before_the_save_is_written_after_it() {
    let output = NamedTempFile::new().unwrap();
    let console = Driver { index: 0, queue: 1 };
    let payload = Payload::of(&[reach_devices(), console.select_in_turn()]);
    let config = kept(&payload, &output);
    let mut vm = start(config.clone());

    for _ in 0..8 {
        wait_for_output(&vm, "1111");
        vm.pause();
        let state = vm.save().unwrap();
        let file = vm.memory_file().unwrap().try_clone().unwrap();
        drop(vm);
        let memory = SavedMemory { file, sharing: Sharing::Shared };
        vm = Vmm::restore(config.clone(), &state, memory).unwrap().start().unwrap();
    }
    wait_for_output(&vm, "1111");
    vm.stop();
    assert_eq!(vm.wait(), Exit::Stopped);

    assert!(printed(&output).bytes().all(|digit| digit == b'1'), "{}", printed(&output));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn register_writes_that_can_wait_cost_no_exits() {
    let payload = Payload::of(&[
        reach_devices(),
        Driver { index: 0, queue: 1 }.behave(),
        print("end"),
        END.to_vec(),
    ]);
    let vm = start(payload.config());
    wait_for_output(&vm, "end");

    // Each of the five writes of the status, those that select the queue, give its size and make it ready,
    // and the three characters.
    assert_eq!(vm.metrics().exits.writes, 5 + 3 + 3);
    assert_eq!(vm.wait(), end());
}

#[test]
#[ignore = "needs /dev/kvm"]
fn only_a_paused_machine_with_its_memory_in_a_file_is_saved() {
    let payload = Payload::of(&[HANG.to_vec()]);
    let mut config = payload.config();
    let vm = start(config.clone());
    vm.pause();
    let error = vm.save().unwrap_err().to_string();
    assert!(error.contains("memory.backing"), "{error}");

    config.memory.backing = MemoryBacking::Memfd;
    let vm = start(config);
    let error = vm.save().unwrap_err().to_string();
    assert_eq!(error, "save the machine: it is running: pause it first");
    vm.stop();
    let error = vm.save().unwrap_err().to_string();
    assert_eq!(error, "save the machine: it has ended");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn the_state_of_another_machine_is_refused() {
    let payload = Payload::of(&[HANG.to_vec()]);
    let mut config = payload.config();
    config.memory.backing = MemoryBacking::Memfd;
    let vm = start(config.clone());
    vm.pause();
    let state = vm.save().unwrap();
    let refused = |config: &VmConfig| {
        let file = vm.memory_file().unwrap().try_clone().unwrap();
        let memory = SavedMemory { file, sharing: Sharing::Private };
        Vmm::restore(config.clone(), &state, memory).err().unwrap().to_string()
    };

    let more = VmConfig { vcpus: 2, ..config.clone() };
    assert_eq!(refused(&more), "the machine was saved with vcpus 1, not 2");
    let mut larger = config.clone();
    larger.memory.size_mib += 1;
    assert_eq!(refused(&larger), "the machine was saved with memory.size_mib 32, not 33");
    let fewer = VmConfig { rng: false, ..config };
    assert_eq!(refused(&fewer), "the machine was saved with devices 2, not 1");
}
