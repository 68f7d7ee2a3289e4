//! The host's side of an agent that runs on this machine, in namespaces of its own.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use agent_protocol::{
    Capabilities, Cgroup, Container, Event, ExitStatus, INIT_PROCESS, Message, Mount, Process,
    Request, Response, Stdio, StdioStream, StreamHello, frame,
};
use nix::fcntl::{FcntlArg, fcntl};
use nix::mount::MsFlags;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tempfile::TempDir;

/// Longest wait for anything; a test that needs more hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// Soft limit of open files the agent is started with: few, so that tests reach it.
const OPEN_FILES: u64 = 64;

const CONTROL_FD: RawFd = 3;
const STDIO_FD: RawFd = 4;

const APPLETS: &str = "sh cat echo id ls sleep stty tty head wc kill true touch mkdir dd sysctl \
                       hostname grep env pwd mount ps test seq stat readlink sed yes";

/// An agent, its connection, and a root file system to make containers of.
pub struct Host {
    agent: Child,
    control: UnixStream,
    events: VecDeque<Event>,
    folder: TempDir,
    cgroups: PathBuf,
}

impl Host {
    /// Starts an agent as PID 1 of new namespaces, and reads its greeting.
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        make_rootfs(&folder.path().join("rootfs"));
        let cgroups = make_cgroups();
        let listener = UnixListener::bind(folder.path().join("stdio")).unwrap();
        let (control, theirs) = UnixStream::pair().unwrap();
        control.set_read_timeout(Some(PATIENCE)).unwrap();
        let (theirs, listener) = (above_standard(&theirs), above_standard(&listener));
        let mut command = Command::new("unshare");
        command.args([
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--net",
            "--uts",
            "--ipc",
        ]);
        command.arg(env!("CARGO_BIN_EXE_coracle-agent")).arg("serve");
        command.args([CONTROL_FD.to_string(), STDIO_FD.to_string()]).arg(&cgroups);
        let numbers = [(theirs.as_raw_fd(), CONTROL_FD), (listener.as_raw_fd(), STDIO_FD)];
        // SAFETY: dup2 and setrlimit are safe between fork and exec; the copies stay open over exec.
        let command = unsafe {
            command.pre_exec(move || {
                for (from, to) in numbers {
                    nix::errno::Errno::result(libc::dup2(from, to))?;
                }
                let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
                Ok(setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, hard)?)
            })
        };
        let agent = command.spawn().unwrap();
        let mut host = Self { agent, control, events: VecDeque::new(), folder, cgroups };
        let ready = host.event();
        assert!(
            matches!(ready, Event::Ready { version: agent_protocol::VERSION, .. }),
            "{ready:?}"
        );
        host
    }

    /// Sends a request and waits for its answer.
    pub fn ask(&mut self, request: &Request) -> Response {
        frame::write(&mut self.control, request).unwrap();
        loop {
            match frame::read(&mut self.control).unwrap().expect("the agent is there") {
                Message::Response(response) => return response,
                Message::Event(event) => self.events.push_back(event),
            }
        }
    }

    /// The next event.
    pub fn event(&mut self) -> Event {
        if let Some(event) = self.events.pop_front() {
            return event;
        }
        match frame::read(&mut self.control).unwrap().expect("the agent is there") {
            Message::Event(event) => event,
            Message::Response(response) => panic!("nobody asked for {response:?}"),
        }
    }

    /// How many ends of the process `name` came along with the answers so far.
    pub fn told_ends_of(&self, name: &str) -> usize {
        let is_end =
            |event: &&Event| matches!(event, Event::Exited { process, .. } if process == name);
        self.events.iter().filter(is_end).count()
    }

    /// Waits for the end of a process.
    pub fn exit_of(&mut self, container: &str, name: &str) -> ExitStatus {
        loop {
            if let Event::Exited { container: of, process, status } = self.event() {
                if of == container && process == name {
                    return status;
                }
            }
        }
    }

    /// Opens a stream of a process.
    pub fn stream(&self, container: &str, process: &str, stream: StdioStream) -> UnixStream {
        let mut connection = UnixStream::connect(self.folder.path().join("stdio")).unwrap();
        connection.set_read_timeout(Some(PATIENCE)).unwrap();
        let (container, process) = (container.to_owned(), process.to_owned());
        frame::write(&mut connection, &StreamHello { container, process, stream }).unwrap();
        connection
    }

    /// A container that runs `args`, configured as engines do.
    pub fn container(&self, args: &[&str]) -> Container {
        let rootfs = self.rootfs().to_str().unwrap().to_owned();
        let namespaces = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWUTS;
        let namespaces = namespaces | libc::CLONE_NEWIPC | libc::CLONE_NEWCGROUP;
        Container {
            id: "box".into(),
            rootfs,
            rootfs_readonly: false,
            rootfs_propagation: 0,
            hostname: Some("boxed".into()),
            domainname: None,
            namespaces: u64::try_from(namespaces).unwrap(),
            mounts: default_mounts(),
            devices: vec![],
            masked_paths: vec![],
            readonly_paths: vec![],
            sysctl: vec![],
            cgroup: Cgroup::default(),
            start_hooks: vec![],
            state: String::new(),
            process: process(args),
        }
    }

    /// Where its root file system is on this machine.
    pub fn rootfs(&self) -> PathBuf {
        self.folder.path().join("rootfs")
    }

    /// Creates and starts a container, and returns all its output with its end.
    pub fn run(&mut self, container: &Container) -> (String, ExitStatus) {
        let mut stdout = self.stream(&container.id, INIT_PROCESS, StdioStream::Stdout);
        self.create(container);
        self.start_box();
        let mut text = String::new();
        stdout.read_to_string(&mut text).unwrap();
        (text, self.exit_of(&container.id, INIT_PROCESS))
    }

    /// Creates a container, which must work.
    pub fn create(&mut self, container: &Container) {
        let response = self.ask(&Request::CreateContainer(Box::new(container.clone())));
        assert!(matches!(response, Response::Created { .. }), "{response:?}");
    }

    /// Starts the container, which must work.
    pub fn start_box(&mut self) {
        assert_eq!(self.ask(&Request::StartContainer { container: "box".into() }), Response::Done);
    }

    /// Starts one more process, which must work.
    pub fn exec(&mut self, name: &str, process: Process) {
        let response = self.ask(&exec(name, process));
        assert!(matches!(response, Response::Created { .. }), "{response:?}");
    }

    /// The message of the failure that creating `container` ends in.
    pub fn refusal(&mut self, container: Container) -> String {
        match self.ask(&Request::CreateContainer(Box::new(container))) {
            Response::Failed(failed) => failed.message,
            response => panic!("{response:?}"),
        }
    }

    /// The cgroup of the container.
    pub fn cgroup(&self) -> PathBuf {
        self.cgroups.join("coracle/box")
    }

    /// Names of the cgroups of containers.
    pub fn cgroup_names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.cgroups.join("coracle")).unwrap().map(Result::unwrap);
        let folders = entries.filter(|entry| entry.file_type().unwrap().is_dir());
        folders.map(|entry| entry.file_name().into_string().unwrap()).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The agent goes with its parent, and with it all it started.
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        let containers = self.cgroups.join("coracle");
        for entry in fs::read_dir(&containers).into_iter().flatten().flatten() {
            let _ = fs::write(entry.path().join("cgroup.kill"), "1");
            std::thread::sleep(Duration::from_millis(50));
            let _ = fs::remove_dir(entry.path().join("init"));
            let _ = fs::remove_dir(entry.path());
        }
        let _ = fs::remove_dir(&containers);
        let _ = fs::remove_dir(&self.cgroups);
    }
}

/// What root may do here: a machine that is a container itself lacks some.
fn own_capabilities() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(mask.trim(), 16).unwrap()
}

/// A process of root with all capabilities and output only.
pub fn process(args: &[&str]) -> Process {
    let all = own_capabilities();
    Process {
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        env: vec!["PATH=/usr/bin:/bin".into()],
        cwd: "/".into(),
        uid: 0,
        gid: 0,
        additional_gids: vec![],
        umask: None,
        capabilities: Capabilities {
            bounding: all,
            effective: all,
            permitted: all,
            ..Capabilities::default()
        },
        rlimits: vec![],
        no_new_privs: false,
        oom_score_adj: None,
        seccomp: None,
        terminal: None,
        stdio: Stdio { stdin: false, stdout: true, stderr: false },
    }
}

/// The request for one more process of the container.
pub fn exec(name: &str, process: Process) -> Request {
    Request::Exec { container: "box".into(), name: name.into(), process: Box::new(process) }
}

/// Reads from `stream` until `text` has come.
pub fn read_until(stream: &mut impl Read, text: &str) -> String {
    let mut all = String::new();
    let mut byte = [0];
    while !all.contains(text) {
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "the stream ended after {all:?}");
        all.push(char::from(byte[0]));
    }
    all
}

fn default_mounts() -> Vec<Mount> {
    let closed = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    let locked = closed | MsFlags::MS_NODEV;
    vec![
        file_system("proc", "/proc", locked, ""),
        file_system("tmpfs", "/dev", MsFlags::MS_NOSUID, "mode=755,size=65536k"),
        file_system("devpts", "/dev/pts", closed, "newinstance,ptmxmode=0666,mode=0620,gid=5"),
        file_system("sysfs", "/sys", locked | MsFlags::MS_RDONLY, ""),
        file_system("cgroup", "/sys/fs/cgroup", locked | MsFlags::MS_RDONLY, ""),
        file_system("mqueue", "/dev/mqueue", locked, ""),
        file_system("tmpfs", "/dev/shm", locked, "mode=1777,size=65536k"),
    ]
}

/// A mount of a file system without a source of its own.
pub fn file_system(fstype: &str, destination: &str, flags: MsFlags, data: &str) -> Mount {
    Mount {
        destination: destination.into(),
        source: fstype.into(),
        fstype: fstype.into(),
        flags: flags.bits(),
        clear_flags: 0,
        propagation: vec![],
        data: data.into(),
        copy_up: false,
    }
}

/// A bind mount.
pub fn bind(source: &Path, destination: &str, flags: MsFlags) -> Mount {
    let source = source.to_str().unwrap().to_owned();
    Mount { source, ..file_system("bind", destination, flags | MsFlags::MS_BIND, "") }
}

fn make_rootfs(rootfs: &Path) {
    for folder in ["bin", "proc", "sys", "dev", "etc", "tmp", "root"] {
        fs::create_dir_all(rootfs.join(folder)).unwrap();
    }
    fs::copy("/bin/busybox", rootfs.join("bin/busybox")).expect("busybox-static is installed");
    for applet in APPLETS.split_whitespace() {
        symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\nme:x:1000:1000::/home/me:/bin/sh\n";
    fs::write(rootfs.join("etc/passwd"), passwd).unwrap();
}

/// A cgroup to take for the root of a hierarchy.
fn make_cgroups() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let unified = Path::new("/sys/fs/cgroup/unified");
    let root = if unified.is_dir() { unified } else { Path::new("/sys/fs/cgroup") };
    // A machine with version 1 has few controllers here, and nobody who hands them down.
    for controller in fs::read_to_string(root.join("cgroup.controllers")).unwrap().split(' ') {
        let _ = fs::write(root.join("cgroup.subtree_control"), format!("+{controller}"));
    }
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = root.join(format!("coracle-test-{}-{number}", std::process::id()));
    fs::create_dir(&path).unwrap();
    path
}

/// A copy whose number is none that the agent expects something at.
fn above_standard(descriptor: &impl AsRawFd) -> OwnedFd {
    // SAFETY: the caller's descriptor is open during the call; the copy has no other owner.
    unsafe {
        let borrowed = std::os::fd::BorrowedFd::borrow_raw(descriptor.as_raw_fd());
        OwnedFd::from_raw_fd(fcntl(borrowed, FcntlArg::F_DUPFD_CLOEXEC(10)).unwrap())
    }
}

/// Writes all of `bytes` from another thread, then half-closes.
pub fn feed(stream: &UnixStream, bytes: Vec<u8>) -> std::thread::JoinHandle<()> {
    let mut stream = stream.try_clone().unwrap();
    std::thread::spawn(move || {
        stream.write_all(&bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
    })
}

/// Bytes that do not repeat soon.
pub fn noise(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
    bytes
}
