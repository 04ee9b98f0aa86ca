//! The command line as a whole: the nouns, and what every command takes.

use clap::{Args, Parser, Subcommand};

use crate::command;
use crate::failure::Failure;
use crate::print::Format;
use crate::session::Session;

const EXIT_CODES: &str = "Exit codes:
  0 done · 1 failed · 2 wrong usage · 3 not found · 4 refused · 5 controller unreachable
  6 timed out, the job goes on · 7 not recoverable as asked

Start with one of these, then walfleet status:
  walfleet context add NAME admin.context.yaml --use    # the file is made by walfleet-controller
  walfleet login --controller https://HOST:PORT --token TOKEN";

/// Protects fleets of PostgreSQL servers: see what can be recovered, back up, restore to any second.
#[derive(Parser, Debug)]
#[command(
    name = "walfleet",
    version,
    max_term_width = 100,
    after_help = EXIT_CODES,
    disable_help_subcommand = true,
    arg_required_else_help = true
)]
pub struct Cli {
    #[command(flatten)]
    pub everywhere: Everywhere,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Everywhere")]
pub struct Everywhere {
    /// How the answer is printed: table, wide, json or yaml [default: table]
    #[arg(
        short,
        long,
        global = true,
        value_enum,
        default_value = "table",
        value_name = "FORMAT",
        hide_possible_values = true,
        hide_default_value = true
    )]
    pub output: Format,
    /// Which controller, and as whom: a context's name, or a context file [env: WALFLEET_CONTEXT]
    #[arg(long, global = true, value_name = "NAME|FILE")]
    pub context: Option<String>,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    Status(command::status::StatusArgs),
    Apply(command::apply::ApplyArgs),
    Diff(command::diff::DiffArgs),
    /// Policies: what is backed up when, and how long it is kept
    #[command(subcommand)]
    Policy(command::policy::PolicyCommand),
    /// Repositories: where backups and WAL are stored
    #[command(subcommand)]
    Repository(command::repository::RepositoryCommand),
    /// Clusters: what of them can be recovered
    #[command(subcommand)]
    Cluster(command::cluster::ClusterCommand),
    /// Agents: the hosts of the fleet
    #[command(subcommand)]
    Agent(command::agent::AgentCommand),
    /// Backups: take, list and verify them
    #[command(subcommand)]
    Backup(command::backup::BackupCommand),
    /// Retention: what is kept, and why
    #[command(subcommand)]
    Retention(command::retention::RetentionCommand),
    /// Holds: what is kept whatever retention says
    #[command(subcommand)]
    Hold(command::hold::HoldCommand),
    /// Replicas: other places of repositories
    #[command(subcommand)]
    Replica(command::replica::ReplicaCommand),
    /// Restores: any cluster, to any second, on any host
    #[command(subcommand)]
    Restore(command::restore::RestoreCommand),
    /// WAL: how far it is stored, and what is missing
    #[command(subcommand)]
    Wal(command::wal::WalCommand),
    /// Jobs: what runs, what ran, how it ended
    #[command(subcommand)]
    Job(command::job::JobCommand),
    /// Join tokens: they admit agents and operators
    #[command(subcommand)]
    Token(command::token::TokenCommand),
    /// Audit log: who changed what, and what was refused
    #[command(subcommand)]
    Audit(command::audit::AuditCommand),
    /// Contexts: the controllers this user talks to
    #[command(subcommand)]
    Context(command::context::ContextCommand),
    Login(command::login::LoginArgs),
    Completions(command::completions::CompletionsArgs),
    /// Show this program's version
    Version,
}

impl Command {
    pub async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        match self {
            Command::Status(args) => args.run(session).await,
            Command::Apply(args) => args.run(session).await,
            Command::Diff(args) => args.run(session).await,
            Command::Policy(command) => command.run(session).await,
            Command::Repository(command) => command.run(session).await,
            Command::Cluster(command) => command.run(session).await,
            Command::Agent(command) => command.run(session).await,
            Command::Backup(command) => command.run(session).await,
            Command::Retention(command) => command.run(session).await,
            Command::Hold(command) => command.run(session).await,
            Command::Replica(command) => command.run(session).await,
            Command::Restore(command) => command.run(session).await,
            Command::Wal(command) => command.run(session).await,
            Command::Job(command) => command.run(session).await,
            Command::Token(command) => command.run(session).await,
            Command::Audit(command) => command.run(session).await,
            Command::Context(command) => command.run(session),
            Command::Login(args) => args.run(session).await,
            Command::Completions(args) => args.run(session),
            Command::Version => command::version::run(session),
        }
    }
}
