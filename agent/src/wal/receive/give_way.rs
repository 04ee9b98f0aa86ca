//! A server that shuts down waits until all of its WAL is flushed here, however long the store takes. It asks for that behind
//! all that it has, which is not read while too much waits: so its own word for what it does is read.

use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;

use super::ReceiveError;
use crate::postgres::instance::{self, InstanceState, PostmasterStatus};

/// How long the server's own end may wait for the repository to take its last WAL.
const GIVE_WAY: Duration = Duration::from_secs(10);

/// The server was seen to shut down, and not all of its WAL is durable: since when.
#[derive(Default)]
pub struct Stopping(Option<Instant>);

impl Stopping {
    /// An error: the server has waited long enough.
    pub async fn look(&mut self, data_dir: &Path) -> Result<(), ReceiveError> {
        let data_dir = data_dir.to_owned();
        let found = tokio::task::spawn_blocking(move || instance::inspect(&data_dir)).await;
        match found.ok().and_then(Result::ok).map(|found| found.state) {
            Some(InstanceState::Running(postmaster)) if postmaster.status == PostmasterStatus::Stopping => {
                let since = *self.0.get_or_insert_with(Instant::now);
                if since.elapsed() >= GIVE_WAY { Err(ReceiveError::GaveWay) } else { Ok(()) }
            }
            _ => {
                self.0 = None;
                Ok(())
            }
        }
    }
}
