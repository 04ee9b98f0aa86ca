//! `walfleet agent`

use clap::Subcommand;

use crate::failure::Failure;
use crate::session::Session;
use crate::view::agent::Agents;

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
    /// WAL of its instances is then no longer stored. The host needs a new token to come back.
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
    let agent = client.agent(name).await?;
    for instance in agent.instances.iter().filter(|instance| instance.cluster.is_some()) {
        let cluster = instance.cluster.as_deref().unwrap_or_default();
        session.note(&format!("{name} is the {} of {cluster} in {}", instance.role.word(), instance.data_dir));
    }
    for job in &agent.running_jobs {
        session.note(&format!("{name} runs {job}, which ends as unknown"));
    }
    session.confirm(&format!("revoke agent {name}"), name, yes)?;
    client.revoke_agent(name).await?;
    session.note(&format!("agent {name} is revoked"));
    Ok(())
}
