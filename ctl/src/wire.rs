//! The door to the controller: the only module that names generated types. Every call the program makes, and the
//! conversions of what goes out and comes in.
//!
//! Inward nothing fails: this is what an operator looks at while something is broken, and a newer controller may say
//! what this version does not know. What cannot be understood becomes "unknown" or null, never a guess.

mod access;
mod audit;
mod enrolment;
mod fleet;
mod found;
mod jobs;
mod recovery;
mod replicas;
mod resources;
mod retention;
mod wal;

pub use enrolment::Admission;
pub use jobs::{FindSpec, JobWatch, RestoreSpec};
pub use resources::Intent;
pub use retention::HoldSpec;

use std::future::Future;
use std::time::Duration;

use jiff::Timestamp;
use tonic::Status;

/// How often a message is sent again when its answer was lost.
const ATTEMPTS: u32 = 3;
/// A controller that restarts is back after a second or two.
const PAUSE: Duration = Duration::from_millis(700);

/// Microseconds since the epoch; 0 means absent.
fn moment(us: i64) -> Option<Timestamp> {
    if us == 0 { None } else { Timestamp::from_microsecond(us).ok() }
}

fn text(value: String) -> Option<String> {
    if value.is_empty() { None } else { Some(value) }
}

fn number<T: Default + PartialEq>(value: T) -> Option<T> {
    if value == T::default() { None } else { Some(value) }
}

/// Sends again what may not have arrived; only for messages that carry a key, so that they take effect once.
async fn insist<T, F, A>(mut attempt: F) -> Result<T, Status>
where
    F: FnMut() -> A,
    A: Future<Output = Result<T, Status>>,
{
    let mut left = ATTEMPTS;
    loop {
        left -= 1;
        match attempt().await {
            Err(status) if status.code() == tonic::Code::Unavailable && left > 0 => {
                tokio::time::sleep(PAUSE).await;
            }
            outcome => return outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_foreign_time_is_fatal() {
        assert_eq!(moment(0), None);
        assert_eq!(moment(i64::MAX), None);
        assert_eq!(moment(i64::MIN), None);
        assert_eq!(moment(1).map(|at| at.as_microsecond()), Some(1));
    }
}
