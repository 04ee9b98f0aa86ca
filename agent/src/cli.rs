//! The command line: what is understood, and which exit code each end has (`docs/command-line.md`).
//!
//! Arguments become typed requests here; `cli/command/` carries them out. Data goes to stdout, everything else to
//! stderr.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use walfleet_repository::ids::{BackupId, ClusterName};

use crate::config;
use crate::failure::{ExitCode, Failure, Remedy};

mod command;
mod cost;
mod print;
mod progress;
pub mod target;
pub mod time;
pub mod wal;

#[derive(Parser, Debug)]
#[command(
    name = "walfleet-agent",
    version,
    about = "Protects the PostgreSQL servers of this host.",
    max_term_width = 100
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the agent: ship WAL, hold the link to the controller, do its jobs.
    Run(RunArgs),
    /// Enrol this host in a fleet.
    Join(JoinArgs),
    /// Let this host's key open what the fleet has stored, with the recovery key: when no host is left that could grant it.
    Grant(GrantArgs),
    /// Make a repository, and a recovery key if the key file does not exist: for hosts without a controller.
    Init(InitArgs),
    /// Take a backup now.
    Backup(BackupArgs),
    /// Show clusters, or a cluster's backups and what can be recovered.
    List(ListArgs),
    /// Restore a cluster to a point in time.
    Restore(Box<RestoreArgs>),
    /// Check what the repository holds, byte by byte.
    Verify(VerifyArgs),
    /// archive_command and restore_command; finding a transaction in the archive.
    #[command(subcommand)]
    Wal(wal::WalCommand),
    /// Check Postgres, rights, clock, repository and reachability, and say what to type.
    Doctor(DoctorArgs),
}

#[derive(Args, Debug)]
pub struct RunArgs {
    #[arg(long, value_name = "FILE", default_value = config::DEFAULT_PATH)]
    pub config: PathBuf,
}

#[derive(Args, Debug)]
pub struct JoinArgs {
    /// https://host:port; the configuration's if not given.
    #[arg(long, value_name = "URL")]
    pub controller: Option<String>,
    /// From `walfleet token create --role agent`. In the variable it stays out of the process list.
    #[arg(long, value_name = "TOKEN", env = "WALFLEET_TOKEN", hide_env_values = true)]
    pub token: String,
    /// The agent's name in the fleet; the configuration's, or the host's, if not given.
    #[arg(long)]
    pub name: Option<String>,
    /// What policies select by; may be repeated.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = key_value)]
    pub labels: Vec<(String, String)>,
    /// Where the identity is kept; the configuration's, or /var/lib/walfleet-agent, if not given.
    #[arg(long, value_name = "FOLDER")]
    pub state_dir: Option<PathBuf>,
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct GrantArgs {
    /// A key that opens it: the recovery key, or a lost host's own.
    #[arg(long, value_name = "FILE")]
    pub key_file: PathBuf,
    /// Only this cluster; all that the controller has named to this host if not given.
    #[arg(long, value_name = "NAME")]
    pub cluster: Option<ClusterName>,
    /// The agent's configuration; /etc/walfleet/agent.yaml if not given.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct InitArgs {
    /// file:///path or s3://bucket/prefix
    #[arg(long, value_name = "URL")]
    pub repository: String,
    /// Of the repository: endpoint, region, …; may be repeated.
    #[arg(long = "option", value_name = "KEY=VALUE", value_parser = key_value)]
    pub options: Vec<(String, String)>,
    /// The recovery key: made if it does not exist. Whoever loses it and every host loses the backups.
    #[arg(long, value_name = "FILE")]
    pub key_file: PathBuf,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Which repository, and which key opens it.
#[derive(Args, Clone, Default, Debug)]
pub struct RepositoryArgs {
    /// file:///path or s3://bucket/prefix; else the configuration's.
    #[arg(long, value_name = "URL", requires = "key_file")]
    pub repository: Option<String>,
    /// Of the repository: endpoint, region, …; may be repeated.
    #[arg(long = "option", value_name = "KEY=VALUE", value_parser = key_value, requires = "repository")]
    pub options: Vec<(String, String)>,
    #[arg(long, value_name = "FILE", requires = "repository")]
    pub key_file: Option<PathBuf>,
    /// The agent's configuration, /etc/walfleet/agent.yaml if neither this nor --repository is given.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Args, Clone, Default, Debug)]
pub struct OutputArgs {
    #[arg(short = 'o', long = "output", value_enum, default_value_t)]
    pub format: OutputFormat,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, ValueEnum)]
pub enum OutputFormat {
    #[default]
    Table,
    Json,
}

#[derive(Args, Debug)]
pub struct BackupArgs {
    #[command(flatten)]
    pub repository: RepositoryArgs,
    #[arg(long, value_name = "NAME")]
    pub cluster: ClusterName,
    /// Of the instance; the configuration's for this cluster if not given.
    #[arg(long, value_name = "FOLDER")]
    pub data_dir: Option<PathBuf>,
    /// As for libpq; from postmaster.pid if neither this nor the configuration says.
    #[arg(long, value_name = "CONNINFO")]
    pub connection: Option<String>,
    /// An immediate checkpoint instead of a spread one.
    #[arg(long)]
    pub fast: bool,
    /// Read every file whole, and hold what the WAL says did not change against the parent backup.
    #[arg(long)]
    pub read_all: bool,
    /// Say what it would cost, as far as earlier backups tell, and take none.
    #[arg(long, conflicts_with_all = ["fast", "processes", "compression_level"])]
    pub plan: bool,
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub processes: Option<u32>,
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..=19))]
    pub compression_level: Option<i32>,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Args, Debug)]
pub struct ListArgs {
    #[command(flatten)]
    pub repository: RepositoryArgs,
    /// All clusters, by name, if not given.
    #[arg(long, value_name = "NAME")]
    pub cluster: Option<ClusterName>,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Args, Debug)]
pub struct RestoreArgs {
    #[command(flatten)]
    pub repository: RepositoryArgs,
    #[arg(long, value_name = "NAME")]
    pub cluster: ClusterName,
    #[command(flatten)]
    pub target: target::TargetArgs,
    /// Where to: an empty or new folder, or with --delta a copy of the cluster.
    #[arg(long, value_name = "FOLDER")]
    pub data_dir: PathBuf,
    /// Over a copy of the same cluster: keep what is right, fetch the rest, remove what the backup does not have.
    #[arg(long)]
    pub delta: bool,
    /// A tablespace's old location (or oid) and its new one; may be repeated.
    #[arg(long = "tablespace", value_name = "OLD=NEW", value_parser = key_value)]
    pub tablespaces: Vec<(String, String)>,
    /// This backup instead of the best one for the target.
    #[arg(long, value_name = "ID")]
    pub backup: Option<BackupId>,
    /// Start Postgres and wait until it stands at the target.
    #[arg(long)]
    pub start: bool,
    /// Of the started server.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Option<u16>,
    /// Leave archive_mode as it was at the source; otherwise it is switched off.
    #[arg(long)]
    pub keep_archiving: bool,
    /// Say what would be done and what it costs, and restore nothing.
    #[arg(long)]
    pub plan: bool,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Args, Debug)]
pub struct VerifyArgs {
    #[command(flatten)]
    pub repository: RepositoryArgs,
    #[arg(long, value_name = "NAME")]
    pub cluster: ClusterName,
    /// Only this backup; all that is live if not given.
    #[arg(long, value_name = "ID")]
    pub backup: Option<BackupId>,
    /// Decrypt and decompress everything too, instead of comparing hashes only.
    #[arg(long)]
    pub deep: bool,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Args, Debug)]
pub struct DoctorArgs {
    #[arg(long, value_name = "FILE", default_value = config::DEFAULT_PATH)]
    pub config: PathBuf,
    /// Do not let repositories prove an atomic create, which leaves a small object behind each time.
    #[arg(long)]
    pub no_probe: bool,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Parses, carries out, and gives the exit code.
pub fn run(arguments: Vec<OsString>) -> i32 {
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { wal::usage_code(&arguments) } else { 0 };
        }
    };
    let result = match cli.command {
        Command::Run(args) => command::run::run(&args),
        Command::Join(args) => command::join::join(args),
        Command::Grant(args) => command::grant::grant(args),
        Command::Init(args) => command::init::init(&args),
        Command::Backup(args) => command::backup::backup(args),
        Command::List(args) => command::list::list(&args),
        Command::Restore(args) => command::restore::restore(*args),
        Command::Verify(args) => command::verify::verify(args),
        Command::Doctor(args) => command::doctor::doctor(&args),
        Command::Wal(wal::WalCommand::Find(args)) => command::find::find(args),
        // Dispatched before this; only `wal` with something unknown behind it comes here, and clap refuses that.
        Command::Wal(_) => Err(usage("walfleet-agent wal push PATH, or walfleet-agent wal fetch NAME PATH")),
    };
    match result {
        Ok(()) => 0,
        Err(failure) => {
            eprintln!("walfleet-agent: {failure}");
            failure.exit as i32
        }
    }
}

/// The whole command, for documentation.
pub fn definition() -> clap::Command {
    Cli::command()
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() && !value.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write it as KEY=VALUE".into()),
    }
}

fn usage(message: impl std::fmt::Display) -> Failure {
    Failure::new("usage", ExitCode::Usage, Remedy::Operator, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(format!("walfleet-agent {line}").split_whitespace())
    }

    #[test]
    fn the_definition_is_sound() {
        definition().debug_assert();
    }

    #[test]
    fn a_repository_is_named_with_its_key_or_by_configuration() {
        parse("list --repository file:///x --key-file /k").unwrap();
        parse("list --config /c").unwrap();
        parse("list").unwrap();
        assert!(parse("list --repository file:///x").is_err(), "no key");
        assert!(parse("list --key-file /k").is_err(), "no repository");
        assert!(parse("list --option region=x").is_err(), "an option of nothing");
        assert!(parse("verify --config /c").is_err(), "no cluster");
        assert!(parse("verify --cluster ../x").is_err(), "not a cluster's name");
    }

    #[test]
    fn numbers_have_their_ranges() {
        parse("backup --cluster a --processes 4 --compression-level 19").unwrap();
        for bad in ["--processes 0", "--processes 65", "--compression-level 0", "--compression-level 20"] {
            assert!(parse(&format!("backup --cluster a {bad}")).is_err(), "{bad}");
        }
        assert!(parse("restore --cluster a --data-dir /d --port 0").is_err());
    }
}
