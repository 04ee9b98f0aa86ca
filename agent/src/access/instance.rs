//! Where an instance listens, when nobody says: as its postmaster.pid has it.

use std::path::PathBuf;

use super::InstanceAccess;
use crate::postgres::instance::{self, InstanceError, InstanceState};
use crate::tasks::on_disk;

#[derive(Debug, thiserror::Error)]
pub enum ReachError {
    #[error("no server runs in {}\nHINT: start it; if it runs elsewhere, set the instance's connection.", data_dir.display())]
    NotRunning { data_dir: PathBuf },
    #[error("the server in {} listens nowhere that can be reached\nHINT: set the instance's connection.", data_dir.display())]
    Unreachable { data_dir: PathBuf },
    #[error(transparent)]
    Instance(#[from] InstanceError),
}

impl InstanceAccess {
    /// As for libpq. Blocking, a few small files.
    pub fn connection_string(&self) -> Result<String, ReachError> {
        if let Some(connection) = &self.connection {
            return Ok(connection.clone());
        }
        let data_dir = || self.data_dir.clone();
        let found = instance::inspect(&self.data_dir)?;
        match &found.state {
            InstanceState::Running(_) => {
                found.connection_string().ok_or_else(|| ReachError::Unreachable { data_dir: data_dir() })
            }
            InstanceState::Stopped | InstanceState::Orphaned { .. } => {
                Err(ReachError::NotRunning { data_dir: data_dir() })
            }
        }
    }

    /// The same where nothing may block.
    pub fn reach(&self) -> impl Future<Output = Result<String, ReachError>> + use<> {
        let instance = self.clone();
        on_disk(move || instance.connection_string())
    }

    /// 0: not known. Blocking, a few small files.
    pub fn port(&self) -> u16 {
        if let Ok(found) = instance::inspect(&self.data_dir)
            && let InstanceState::Running(postmaster) = &found.state
        {
            return postmaster.port;
        }
        let configured = self.connection.as_ref().and_then(|text| text.parse::<tokio_postgres::Config>().ok());
        configured.and_then(|config| config.get_ports().first().copied()).unwrap_or(0)
    }
}
