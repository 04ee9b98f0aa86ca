//! `walfleet context`

use std::path::PathBuf;

use clap::Subcommand;

use crate::certificate;
use crate::context::{Contexts, Known, Overwrite, is_exposed, read_file};
use crate::failure::Failure;
use crate::session::Session;
use crate::view::context::{ContextLine, ContextList};

#[derive(Subcommand, Debug)]
pub enum ContextCommand {
    /// List the contexts of this user
    List,
    /// Make a context the one that is used where none is named
    Use {
        /// The context
        name: String,
    },
    /// Take over a context file, such as the first admin's that walfleet-controller init wrote
    #[command(after_help = "Examples:
  walfleet context add prod admin.context.yaml --use")]
    Add {
        /// The name it gets here
        name: String,
        /// The context file
        file: PathBuf,
        /// Make it current as well
        #[arg(long = "use")]
        use_it: bool,
        /// Replace a context of that name
        #[arg(long)]
        force: bool,
    },
}

impl ContextCommand {
    pub fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        let contexts = Contexts::of(session.surroundings)?;
        match self {
            ContextCommand::List => {
                let lines = contexts.list()?.into_iter().map(line).collect();
                session.show(&ContextList { contexts: lines })
            }
            ContextCommand::Use { name } => {
                contexts.choose(&name)?;
                session.note(&format!("context {name} is current"));
                Ok(())
            }
            ContextCommand::Add { name, file, use_it, force } => {
                let context = read_file(&file)?;
                let overwrite = if force { Overwrite::Replace } else { Overwrite::Refuse };
                let path = contexts.save(&name, &context, overwrite)?;
                session.note(&format!("context {name} is kept in {}", path.display()));
                if use_it || contexts.current()?.is_none() {
                    contexts.choose(&name)?;
                    session.note(&format!("context {name} is current"));
                }
                if is_exposed(&file) {
                    session.note(&format!(
                        "warning: {} holds a private key and others may read it: chmod 600 {0}, or remove it",
                        file.display()
                    ));
                }
                Ok(())
            }
        }
    }
}

fn line(known: Known) -> ContextLine {
    let identity = known.content.as_ref().ok().and_then(|context| certificate::describe(&context.certificate));
    ContextLine {
        name: known.name,
        current: known.current,
        controller: known.content.as_ref().ok().map(|context| context.controller.clone()),
        certificate_not_after: identity.as_ref().map(|identity| identity.not_after),
        operator: identity.map(|identity| identity.name),
        path: known.path.display().to_string(),
        problem: known.content.err().map(|error| error.to_string().lines().next().unwrap_or_default().to_owned()),
    }
}
