//! The controller: initialised once, then a daemon that may be stopped, killed and started again.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use rustix::process::Signal;

use super::Ctl;
use crate::binaries;
use crate::os_user::os_user;
use crate::output::Output;
use crate::ports::free_port;
use crate::process::Process;
use crate::scratch::Scratch;

const START_LIMIT: Duration = Duration::from_secs(20);

/// A fleet of two notices in a second what one of thousands notices in half a minute.
const TUNING: &str = "
agents: { heartbeat_seconds: 1, lost_after_seconds: 3, facts_interval_seconds: 1 }
jobs: { lease_seconds: 5, offer_seconds: 5, reconcile_seconds: 1 }
";

pub struct Controller {
    scratch: Scratch,
    program: PathBuf,
    dir: PathBuf,
    address: (Ipv4Addr, u16),
    url: String,
    environment: Vec<(String, String)>,
    process: Option<Process>,
}

impl Controller {
    /// Makes its folder, its authority and the first admin. Nothing runs yet.
    pub fn init(scratch: &Scratch) -> anyhow::Result<Controller> {
        Controller::init_at(scratch, Ipv4Addr::LOCALHOST)
    }

    /// The same at another of this machine's addresses.
    pub fn init_at(scratch: &Scratch, address: Ipv4Addr) -> anyhow::Result<Controller> {
        Controller::init_with(scratch, (address, free_port()), None)
    }

    /// Its host burns down, and a new one at the same address takes over the repositories of the recovery key.
    pub fn lost_and_replaced(mut self, recovery_key: &Path) -> anyhow::Result<Controller> {
        self.kill_nine()?;
        std::fs::remove_dir_all(&self.dir).context("remove the controller's folder")?;
        Controller::init_with(&self.scratch, self.address, Some(recovery_key))
    }

    fn init_with(
        scratch: &Scratch,
        address: (Ipv4Addr, u16),
        recovery_key: Option<&Path>,
    ) -> anyhow::Result<Controller> {
        let program = binaries::program(binaries::CONTROLLER)?;
        let dir = scratch.join("controller");
        let listen = SocketAddrV4::new(address.0, address.1).to_string();
        let url = format!("https://{listen}");
        let mut command = os_user().command(&program);
        command.arg("init").arg("--dir").arg(&dir).args(["--name", "controller", "--url", &url]);
        command.args(["--listen", &listen]);
        if let Some(key) = recovery_key {
            command.arg("--recovery-key").arg(key);
        }
        Output::of(command, START_LIMIT)?.ok()?;
        scratch.watch_log(&scratch.join("controller.log"));
        let controller =
            Controller { scratch: scratch.clone(), program, dir, address, url, environment: Vec::new(), process: None };
        controller.configure(TUNING)?;
        Ok(controller)
    }

    /// Adds sections to its configuration; a section may come once.
    pub fn configure(&self, yaml: &str) -> anyhow::Result<()> {
        use std::io::Write;
        let mut file = std::fs::OpenOptions::new().append(true).open(self.config()).context("open controller.yaml")?;
        writeln!(file, "{yaml}").context("write controller.yaml")
    }

    /// Of the daemon: the credentials of repositories.
    pub fn environment(&mut self, variables: Vec<(String, String)>) {
        self.environment = variables;
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn config(&self) -> PathBuf {
        self.dir.join("controller.yaml")
    }

    /// Of the fleet; a real operator moves it to a safe.
    pub fn recovery_key(&self) -> PathBuf {
        self.dir.join("recovery.key")
    }

    /// The operator's command as the first admin.
    pub fn admin(&self) -> anyhow::Result<Ctl> {
        Ctl::new(&self.dir.join("admin.context.yaml"))
    }

    pub fn start(&mut self) -> anyhow::Result<()> {
        anyhow::ensure!(self.process.is_none(), "the controller runs already");
        let mut command = os_user().command(&self.program);
        command.arg("run").arg("--config").arg(self.config());
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        self.process = Some(Process::spawn(&self.scratch, "controller", command, Signal::TERM)?);
        let admin = self.admin()?;
        let process = self.process.as_mut().context("just spawned")?;
        crate::wait_for("the controller to answer", START_LIMIT, || {
            if let Some(status) = process.ended()? {
                anyhow::bail!("the controller ended ({status}) while starting:\n{}", process.log_text());
            }
            Ok((admin.run(&["status"])?.code == 0).then_some(()))
        })
    }

    /// As systemd would: SIGTERM, and it must end by itself with 0.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        let mut process = self.process.take().context("the controller does not run")?;
        process.signal(Signal::TERM);
        let status = process.wait(Duration::from_secs(20))?;
        anyhow::ensure!(status.success(), "the controller ended with {status} on SIGTERM");
        Ok(())
    }

    pub fn kill_nine(&mut self) -> anyhow::Result<()> {
        self.process.take().context("the controller does not run")?.kill_nine()
    }

    pub fn leave_running(mut self) {
        if let Some(process) = self.process.take() {
            process.leave_running();
        }
    }
}
