//! The command line of `walfleet-controller`. Parsing and printing; each command's work is beside it in `cli/`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, Subcommand};

use walfleet_proto::telemetry::TelemetryError;

use crate::config::ConfigError;
use crate::serve::StartError;

pub mod init;
pub mod transfer;

/// Wrong usage: what only a person can set right. The unit does not restart after it (RestartPreventExitStatus=).
const USAGE: u8 = 2;
const FAILED: u8 = 1;

/// Decides for a fleet of PostgreSQL servers: what is backed up when, what is kept, who may join.
#[derive(Debug, Parser)]
#[command(name = "walfleet-controller", version, max_term_width = 120)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a new controller: certificate authority, recovery key, first admin, configuration
    Init(InitArgs),
    /// Run the controller
    Run(ConfigArgs),
    /// Give an admin a new certificate when nobody has one any more; the controller must be stopped
    Admin(AdminArgs),
    /// Export or import everything the controller knows; the controller must be stopped
    State {
        #[command(subcommand)]
        command: StateCommand,
    },
}

#[derive(Debug, clap::Args)]
pub struct ConfigArgs {
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = crate::config::DEFAULT_PATH)]
    pub config: PathBuf,
}

#[derive(Debug, clap::Args)]
pub struct InitArgs {
    /// The controller's folder, to be made; a folder that holds anything is refused
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// Where agents and operators will call
    #[arg(long, value_name = "IP:PORT", default_value = "0.0.0.0:7400")]
    pub listen: SocketAddr,
    /// The controller's name, for people; the host's name if absent
    #[arg(long)]
    pub name: Option<String>,
    /// A host name or IP address by which agents and operators reach the controller; may be repeated
    #[arg(long, value_name = "NAME|IP")]
    pub san: Vec<String>,
    /// The URL that the first admin's context names; by default from --san, or --listen, or the host's name
    #[arg(long)]
    pub url: Option<String>,
    /// The first admin's name
    #[arg(long, default_value = "admin")]
    pub admin: String,
    /// Where metrics and health are served, in clear
    #[arg(long, value_name = "IP:PORT")]
    pub metrics_listen: Option<SocketAddr>,
    /// An existing recovery key, so that its repositories go on under this controller; a new one is made if absent
    #[arg(long, value_name = "FILE")]
    pub recovery_key: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub struct AdminArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// The admin's name; whoever has it now is replaced
    #[arg(long)]
    pub name: String,
    /// The context file to write
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// The URL that the context names; by default as for `init`
    #[arg(long)]
    pub url: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum StateCommand {
    /// Write every key as a line of JSON
    Export {
        #[command(flatten)]
        config: ConfigArgs,
        /// A new file, readable by its owner only; standard output if absent
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Read an export into an empty state
    Import {
        #[command(flatten)]
        config: ConfigArgs,
        /// The export
        #[arg(value_name = "FILE")]
        input: PathBuf,
    },
}

/// One text of an error and its causes: what happened first, then why, then what to do about it.
pub fn describe(error: &anyhow::Error) -> String {
    let (mut texts, mut hints): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
    for cause in error.chain() {
        let text = cause.to_string();
        let (what, hint) = text.split_once("\nHINT: ").unwrap_or((&text, ""));
        // A transparent wrapper says what its source says, and some of the repository's errors end with it.
        if texts.last().is_none_or(|last| !last.ends_with(what)) {
            texts.push(what.to_owned());
        }
        if !hint.is_empty() && !hints.iter().any(|known| known == hint) {
            hints.push(hint.to_owned());
        }
    }
    let hints: String = hints.iter().map(|hint| format!("\nHINT: {hint}")).collect();
    format!("{}{hints}", texts.join(": "))
}

/// The documented exit code (docs/command-line.md): `USAGE` for a configuration, a folder or keys that will be no
/// better in two seconds.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    let is_usage = |cause: &(dyn std::error::Error + 'static)| {
        let start = cause.downcast_ref::<StartError>().is_some_and(|error| match error {
            StartError::NotInitialised { .. } | StartError::Authority(_) | StartError::KeeperKey(_) => true,
            StartError::State(_)
            | StartError::Transfer(_)
            | StartError::Row(_)
            | StartError::Tls(_)
            | StartError::Listen { .. } => false,
        });
        let telemetry = matches!(
            cause.downcast_ref::<TelemetryError>(),
            Some(TelemetryError::Filter { .. } | TelemetryError::Exporter { .. })
        );
        start || telemetry || cause.is::<ConfigError>()
    };
    if error.chain().any(is_usage) { USAGE } else { FAILED }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[tokio::test]
    async fn what_only_a_person_can_set_right_is_not_tried_again() {
        use crate::config::Config;
        let folder = tempfile::tempdir().unwrap();
        let absent: anyhow::Error = Config::load(&folder.path().join("controller.yaml")).unwrap_err().into();
        assert_eq!(exit_code(&absent), USAGE);
        let config = Config { directory: folder.path().to_owned(), ..Config::default() };
        let empty: anyhow::Error = crate::serve::start(config).await.map(drop).unwrap_err().into();
        assert_eq!(exit_code(&empty), USAGE, "{empty}");
        let source = std::io::Error::from(std::io::ErrorKind::AddrInUse);
        let taken = StartError::Listen { address: "127.0.0.1:1".parse().unwrap(), option: "listen", source };
        assert_eq!(exit_code(&taken.into()), FAILED, "another process may go");
    }

    #[test]
    fn causes_come_before_hints() {
        let error = anyhow::anyhow!("no such file").context("read it\nHINT: make one.").context("start");
        assert_eq!(describe(&error), "start: read it: no such file\nHINT: make one.");
        let key = walfleet_repository::key_file::KeyFile::read(std::path::Path::new("/nowhere/key")).unwrap_err();
        let said = describe(&anyhow::Error::from(key).context("--recovery-key"));
        assert_eq!(said, "--recovery-key: read key file /nowhere/key: No such file or directory (os error 2)");
    }
}
