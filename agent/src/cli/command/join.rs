//! `join`: enrols this host.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::cli::{JoinArgs, usage};
use crate::config::{self, Config};
use crate::desired::DesiredStore;
use crate::durable;
use crate::failure::{ExitCode, Failure, Remedy};
use crate::identity::join::{JoinError, JoinRequest, join as enrol};
use crate::identity::{IdentityFolder, connect::ConnectError};

pub fn join(args: JoinArgs) -> Result<(), Failure> {
    let token = args.token.parse().map_err(usage)?;
    let config = configuration(args.config.as_deref())?;
    let name = match args.name {
        Some(name) => Config { name: Some(name), ..config.clone() }.agent_name(),
        None => config.agent_name(),
    };
    let name = name.map_err(|error| usage(format!("{error}\nHINT: choose a name with --name.")))?;
    let controller = args.controller.or_else(|| config.controller.as_ref().map(|controller| controller.url.clone()));
    let controller = controller
        .ok_or_else(|| usage("no controller is named\nHINT: give --controller https://host:port, or --config FILE."))?;
    let state_dir = args.state_dir.unwrap_or_else(|| config.state_dir.clone());
    let mut labels = config.labels.clone();
    labels.extend(args.labels);
    let request = JoinRequest { controller, token, name, labels };
    super::run_async(&super::quiet(), |_| async move {
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
        durable::make_folder(&state_dir).map_err(super::failed)?;
        let identity = enrol(&IdentityFolder::new(&state_dir), request).await.map_err(failure)?;
        // Another fleet may count its generations anew.
        DesiredStore::clear(&state_dir).map_err(super::failed)?;
        hand_over(&state_dir)?;
        println!("enrolled as {} until {}", identity.name(), identity.not_after());
        println!("next: walfleet-agent run --config FILE, or systemctl enable --now walfleet-agent");
        Ok(())
    })
}

/// The configuration, if there is one: a host is often enrolled before it is configured.
fn configuration(path: Option<&Path>) -> Result<Config, Failure> {
    match path {
        Some(path) => Config::load(path).map_err(usage),
        None if Path::new(config::DEFAULT_PATH).exists() => {
            Config::load(Path::new(config::DEFAULT_PATH)).map_err(usage)
        }
        None => Ok(Config::default()),
    }
}

/// Root enrols, the service's user runs: what was written belongs to whom the state folder belongs to.
fn hand_over(state_dir: &Path) -> Result<(), Failure> {
    let owner = std::fs::metadata(state_dir).map_err(super::failed)?;
    if !rustix::process::geteuid().is_root() || owner.uid() == 0 {
        return Ok(());
    }
    let folder = state_dir.join("identity");
    let mut paths: Vec<PathBuf> = vec![folder.clone()];
    for entry in std::fs::read_dir(&folder).map_err(super::failed)? {
        paths.push(entry.map_err(super::failed)?.path());
    }
    for path in paths {
        std::os::unix::fs::lchown(&path, Some(owner.uid()), Some(owner.gid()))
            .map_err(|error| super::failed(format!("give {} to its user: {error}", path.display())))?;
    }
    Ok(())
}

fn failure(error: JoinError) -> Failure {
    let (code, exit, remedy) = match &error {
        JoinError::Connect(ConnectError::Url { .. }) => ("usage", ExitCode::Usage, Remedy::Operator),
        JoinError::Connect(ConnectError::Dial { .. } | ConnectError::Timeout { .. }) => {
            ("join.unreachable", ExitCode::Unreachable, Remedy::Retry)
        }
        JoinError::Connect(_) => ("join.untrusted", ExitCode::Refused, Remedy::Operator),
        JoinError::Unanswered { .. } => ("join.unanswered", ExitCode::Unreachable, Remedy::Retry),
        JoinError::Token { .. } => ("join.token", ExitCode::Refused, Remedy::Operator),
        JoinError::AlreadyEnrolled { .. } => ("join.enrolled", ExitCode::Refused, Remedy::Operator),
        JoinError::NameTaken { .. } => ("join.name_taken", ExitCode::Refused, Remedy::Operator),
        JoinError::Refused { .. } => ("join.refused", ExitCode::Refused, Remedy::Operator),
        JoinError::Answer { .. } => ("join.untrusted", ExitCode::Refused, Remedy::Operator),
        JoinError::ClockBehind { .. } | JoinError::ClockAhead { .. } => {
            ("join.clock", ExitCode::Failed, Remedy::Operator)
        }
        JoinError::Identity(_) => ("identity", ExitCode::Failed, Remedy::Operator),
    };
    Failure::new(code, exit, remedy, error)
}
