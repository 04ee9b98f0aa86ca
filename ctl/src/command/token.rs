//! `walfleet token`

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use crate::failure::Failure;
use crate::quantity::parse_duration;
use crate::session::Session;
use crate::view::token::Tokens;

#[derive(Subcommand, Debug)]
pub enum TokenCommand {
    Create(CreateArgs),
    /// List tokens that were made, used or not
    List,
    /// Make a token worthless that was not used yet
    Revoke {
        id: String,
    },
}

/// Make a token that admits one agent or one operator, once
///
/// The token is printed this once. Whoever holds it may join in that role: treat it as a password.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  walfleet token create --role agent
  walfleet token create --role agent --ttl 15m --label env=prod --label tier=a
  walfleet token create --role viewer --ttl 1d")]
pub struct CreateArgs {
    /// Whom it admits
    #[arg(long, value_enum)]
    role: Role,
    /// How long it may be used: 1m to 7d [default: 1h]
    #[arg(long, value_name = "DURATION", default_value = "1h", hide_default_value = true, value_parser = ttl)]
    ttl: Duration,
    /// A label that the agent gets, over its own; may be repeated
    #[arg(long = "label", value_name = "NAME=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Role {
    /// A Postgres host
    Agent,
    /// A person or script that looks
    Viewer,
    /// ... that also starts backups and restores
    Operator,
    /// ... that also declares resources and admits others
    Admin,
}

impl Role {
    fn word(self) -> &'static str {
        match self {
            Role::Agent => "agent",
            Role::Viewer => "viewer",
            Role::Operator => "operator",
            Role::Admin => "admin",
        }
    }
}

/// The controller's own limits (CreateTokenRequest.ttl_seconds).
fn ttl(text: &str) -> Result<Duration, String> {
    let ttl = parse_duration(text)?;
    if (60..=604_800).contains(&ttl.as_secs()) { Ok(ttl) } else { Err("it must be from 1m to 7d".to_owned()) }
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write NAME=VALUE".to_owned()),
    }
}

impl TokenCommand {
    pub async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        match self {
            TokenCommand::Create(args) => args.run(session).await,
            TokenCommand::List => {
                let tokens = session.client().await?.tokens().await?;
                session.show(&Tokens { tokens })
            }
            TokenCommand::Revoke { id } => {
                session.client().await?.revoke_token(&id).await?;
                session.note(&format!("token {id} is revoked"));
                Ok(())
            }
        }
    }
}

impl CreateArgs {
    async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        let given = self.labels.len();
        let labels: std::collections::BTreeMap<String, String> = self.labels.into_iter().collect();
        if labels.len() < given {
            return Err(Failure::Usage("--label names a label twice\nHINT: give each label once.".to_owned()));
        }
        let token = session.client().await?.create_token(self.role.word(), self.ttl, &labels).await?;
        session.show(&token)?;
        if session.is_for_people() {
            let until = token.expires_at.map(|at| crate::when::full(at, session.now())).unwrap_or_default();
            session.note(&format!("good for one {}, until {until}; use it with:\n  {}", token.role, token.command));
        }
        Ok(())
    }
}
