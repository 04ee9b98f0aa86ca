//! `walfleet agent`

use clap::Subcommand;

use crate::exit::Exit;
use crate::failure::Failure;
use crate::session::Session;
use crate::view::agent::{Agent, Agents};

#[derive(Subcommand, Debug)]
pub enum AgentCommand {
    /// List agents and what they found on their hosts
    List {
        /// Only those whose labels match
        #[arg(short = 'l', long, value_name = "LABELS", default_value = "", hide_default_value = true)]
        selector: String,
    },
    /// Show one agent and its Postgres instances
    Show {
        /// The agent
        name: String,
    },
    /// Refuse an agent's certificate from now on and close its connection
    ///
    /// WAL of its instances is then no longer stored. The host needs a new token to come back. An operator is revoked
    /// the same way, by name.
    Revoke {
        /// The agent
        name: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

impl AgentCommand {
    pub async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        match self {
            AgentCommand::List { selector } => {
                let agents = session.client().await?.agents(&selector).await?;
                session.show(&Agents { agents })
            }
            AgentCommand::Show { name } => {
                let agent = session.client().await?.agent(&name).await?;
                session.show(&agent)
            }
            AgentCommand::Revoke { name, yes } => revoke(session, &name, yes).await,
        }
    }
}

async fn revoke(session: &mut Session<'_>, name: &str, yes: bool) -> Result<(), Failure> {
    let client = session.client().await?;
    match client.agent(name).await {
        Ok(agent) => tell_what_goes(session, &agent),
        // Agents and operators share one namespace of members; the controller knows both.
        Err(error) if error.exit() == Exit::NotFound => {
            session.note(&format!("{name} is no agent; if it is an operator, its certificates are refused"));
        }
        Err(error) => return Err(error.into()),
    }
    session.confirm(&format!("revoke {name}"), name, yes)?;
    client.revoke_agent(name).await?;
    session.note(&format!("{name} is revoked"));
    Ok(())
}

fn tell_what_goes(session: &mut Session<'_>, agent: &Agent) {
    let name = &agent.name;
    for instance in &agent.instances {
        if let Some(cluster) = &instance.cluster {
            session.note(&format!("{name} is the {} of {cluster} in {}", instance.role.word(), instance.data_dir));
        }
    }
    for job in &agent.running_jobs {
        session.note(&format!("{name} runs {job}, which ends as unknown"));
    }
}
