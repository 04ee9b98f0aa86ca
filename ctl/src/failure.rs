//! Everything a command can end with except success, and its exit code.

use std::path::PathBuf;

use crate::client::CallError;
use crate::client::pinned::TokenError;
use crate::context::ContextError;
use crate::exit::Exit;
use crate::print::PrintError;
use crate::target::TargetError;

#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error(transparent)]
    Context(#[from] ContextError),
    #[error(transparent)]
    Call(#[from] CallError),
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(transparent)]
    Print(#[from] PrintError),
    /// Arguments that read well and do not fit together.
    #[error("{0}")]
    Usage(String),
    #[error("read {}: {source}", path.display())]
    Input { path: PathBuf, source: std::io::Error },
    #[error("write to standard output: {0}")]
    Output(std::io::Error),
    #[error("there is no {kind} \"{name}\"\nHINT: {hint}.")]
    NotFound { kind: &'static str, name: String, hint: &'static str },
    /// The operator did not say yes, or nobody could be asked.
    #[error("{what}: not done, {why}")]
    NotConfirmed { what: String, why: &'static str },
    #[error("{title} failed ({code}): {message}")]
    Job { title: String, code: String, message: String, exit: Exit },
    #[error("{title} was cancelled{detail}")]
    JobCancelled { title: String, detail: String, exit: Exit },
    #[error("{title} {why} and goes on\nHINT: follow it with: walfleet job watch {id}")]
    JobGoesOn { id: String, title: String, why: String },
    #[error("{title}: {found} damaged\nHINT: take a new backup of the cluster, then see to the store.")]
    Damaged { title: String, found: String },
    #[error("{operation}: {reason}")]
    Identity { operation: &'static str, reason: String },
    #[error(
        "the token admits an agent, not an operator; it is used up now\nHINT: ask for one made with: walfleet token create --role operator"
    )]
    AgentToken,
}

impl Failure {
    pub fn exit(&self) -> Exit {
        match self {
            Failure::Call(error) => error.exit(),
            Failure::Job { exit, .. } | Failure::JobCancelled { exit, .. } => *exit,
            Failure::Context(_)
            | Failure::Target(_)
            | Failure::Token(_)
            | Failure::Usage(_)
            | Failure::Input { .. } => Exit::Usage,
            Failure::NotFound { .. } => Exit::NotFound,
            Failure::NotConfirmed { .. } | Failure::AgentToken => Exit::Refused,
            Failure::JobGoesOn { .. } => Exit::TimedOut,
            Failure::Print(_) | Failure::Output(_) | Failure::Damaged { .. } | Failure::Identity { .. } => Exit::Failed,
        }
    }
}
