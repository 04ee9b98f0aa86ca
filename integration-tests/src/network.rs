//! Hosts of their own on one machine: a network namespace, and the line to it, which can be bad. Needs root and iproute2.

use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::process::run;

/// A namespace and a pair of interfaces between it and ours. Both end with the handle; processes inside go on without.
pub struct Line {
    namespace: String,
    near_name: String,
    near: Ipv4Addr,
    far: Ipv4Addr,
}

/// Networks of four addresses in 100.64.0.0/10 (RFC 6598), which no real host has.
const NETWORKS: u32 = 1 << 20;

impl Line {
    /// `None` without root: said once for each test.
    pub fn lay() -> anyhow::Result<Option<Line>> {
        static LAID: AtomicU32 = AtomicU32::new(0);
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: a network namespace needs root");
            return Ok(None);
        }
        // Processes have numbers of their own, and so have the lines of one.
        let network = (std::process::id() * 16 + LAID.fetch_add(1, Ordering::Relaxed)) % NETWORKS;
        let address = |host: u32| Ipv4Addr::from(u32::from(Ipv4Addr::new(100, 64, 0, 0)) + network * 4 + host);
        let line = Line {
            namespace: format!("walfleet-{network}"),
            near_name: format!("wf{network}a"),
            near: address(1),
            far: address(2),
        };
        let (namespace, near, far) = (line.namespace.as_str(), line.near_name.as_str(), format!("wf{network}b"));
        ip(&["netns", "add", namespace])?;
        ip(&["link", "add", near, "type", "veth", "peer", "name", &far, "netns", namespace])?;
        ip(&["address", "add", &format!("{}/30", address(1)), "dev", near])?;
        ip(&["link", "set", near, "up"])?;
        ip(&["-n", namespace, "address", "add", &format!("{}/30", address(2)), "dev", &far])?;
        ip(&["-n", namespace, "link", "set", &far, "up"])?;
        ip(&["-n", namespace, "link", "set", "lo", "up"])?;
        Ok(Some(line))
    }

    /// Where servers on this side are reached from the namespace.
    pub fn near(&self) -> Ipv4Addr {
        self.near
    }

    /// Where servers in the namespace are reached from this side.
    pub fn far(&self) -> Ipv4Addr {
        self.far
    }

    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Each way carries so much, in kilobits a second, and little of what comes faster waits: the rest is lost, and sent
    /// again by TCP.
    pub fn narrow(&self, rate_kbit: u32) -> anyhow::Result<()> {
        self.shape(&["rate", &format!("{rate_kbit}kbit"), "burst", "4kb", "limit", "16kb"])
    }

    /// Nothing passes, and neither side hears of it: no packet is as small as what would.
    pub fn cut(&self) -> anyhow::Result<()> {
        self.shape(&["rate", "8kbit", "burst", "10", "limit", "10"])
    }

    pub fn mend(&self) -> anyhow::Result<()> {
        for (place, device) in self.ends() {
            tc(&place, &["qdisc", "delete", "dev", &device, "root"])?;
        }
        Ok(())
    }

    /// A token bucket at both ends, as tc-tbf(8) words it. Kernels for containers have no netem.
    fn shape(&self, bucket: &[&str]) -> anyhow::Result<()> {
        for (place, device) in self.ends() {
            tc(&place, &[&["qdisc", "replace", "dev", &device, "root", "tbf"], bucket].concat())?;
        }
        Ok(())
    }

    fn ends(&self) -> [(Vec<&str>, String); 2] {
        let near = self.near_name.as_str();
        let far = format!("{}b", near.trim_end_matches('a'));
        [(vec![], near.to_owned()), (vec!["-n", &self.namespace], far)]
    }
}

fn tc(place: &[&str], words: &[&str]) -> anyhow::Result<()> {
    let mut tc = Command::new("tc");
    tc.args(place).args(words);
    run(tc).map(drop)
}

impl Drop for Line {
    fn drop(&mut self) {
        // Of a line half laid, what there is.
        let _ = ip(&["link", "delete", &self.near_name]);
        let _ = ip(&["netns", "delete", &self.namespace]);
    }
}

fn ip(words: &[&str]) -> anyhow::Result<()> {
    let mut ip = Command::new("ip");
    ip.args(words);
    run(ip).map(drop)
}

/// Has a command run in a namespace, where it has no network but the line. The child's pid is still the program's.
pub fn inside(namespace: &str, command: &Command) -> Command {
    let mut outer = Command::new("nsenter");
    outer.arg(format!("--net=/run/netns/{namespace}")).arg("--").arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        set_or_remove(&mut outer, name, value);
    }
    outer.current_dir("/");
    outer
}

fn set_or_remove(command: &mut Command, name: &OsStr, value: Option<&OsStr>) {
    match value {
        Some(value) => command.env(name, value),
        None => command.env_remove(name),
    };
}
