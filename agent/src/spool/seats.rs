//! Writers whose connection is lost may be back at once, and go on behind what is kept of them. One connection has a
//! writer's seat at a time: the next takes it over, also from one that is dead and does not know it yet.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::files::{Owner, ParkedLog};
use super::message::WriterId;

/// How long the connection before may take to end: less than a writer waits for the first answer.
const HANDOVER: Duration = Duration::from_secs(1);

/// What is kept of a writer that is not there.
pub struct Parked {
    pub log: ParkedLog,
    /// Everything up to this piece is synced to disk, or was let go of.
    pub last: u64,
}

/// Of each owner the newest writer's.
#[derive(Default)]
pub struct Seats(Mutex<BTreeMap<Owner, Seat>>);

struct Seat {
    writer: WriterId,
    /// Tells the connection that has it to end.
    leave: CancellationToken,
    parked: Arc<tokio::sync::Mutex<Option<Parked>>>,
}

/// A writer's seat, as long as its connection lasts.
pub struct Taken {
    /// Another connection of the same writer is there.
    pub leave: CancellationToken,
    /// `None`: the writer has no name, and will not be known again.
    seat: Option<OwnedMutexGuard<Option<Parked>>>,
}

impl Seats {
    pub async fn take(&self, owner: &Owner, writer: Option<WriterId>) -> Result<Taken, Status> {
        let leave = CancellationToken::new();
        let Some(writer) = writer else { return Ok(Taken { leave, seat: None }) };
        let parked = {
            let mut seats = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match seats.get_mut(owner).filter(|seat| seat.writer == writer) {
                Some(seat) => {
                    std::mem::replace(&mut seat.leave, leave.clone()).cancel();
                    Arc::clone(&seat.parked)
                }
                None => {
                    let seat = Seat { writer, leave: leave.clone(), parked: Arc::default() };
                    let parked = Arc::clone(&seat.parked);
                    seats.insert(owner.clone(), seat);
                    parked
                }
            }
        };
        let seat = tokio::time::timeout(HANDOVER, parked.lock_owned()).await;
        let seat = seat.map_err(|_| Status::unavailable("the writer's connection before has not ended yet"))?;
        Ok(Taken { leave, seat: Some(seat) })
    }
}

impl Taken {
    /// What a connection before has left here.
    pub fn parked(&mut self) -> Option<Parked> {
        self.seat.as_mut()?.take()
    }

    /// For the next connection.
    pub fn park(mut self, parked: Parked) {
        if let Some(seat) = &mut self.seat {
            **seat = Some(parked);
        }
    }
}
