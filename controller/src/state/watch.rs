//! What a watch delivers. The engine feeds it; a watch that is not read holds no memory beyond its channel.

use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::mpsc;

use super::{KeyValue, StateError};

/// One change. Changes of one transaction share the revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Put { revision: u64, entry: KeyValue },
    Delete { revision: u64, key: String },
}

impl Event {
    pub fn revision(&self) -> u64 {
        match self {
            Self::Put { revision, .. } | Self::Delete { revision, .. } => *revision,
        }
    }

    pub fn key(&self) -> &str {
        match self {
            Self::Put { entry, .. } => &entry.key,
            Self::Delete { key, .. } => key,
        }
    }
}

/// Ends when the state closes, or after an error.
pub struct Watch {
    events: mpsc::Receiver<Result<Event, StateError>>,
}

impl Watch {
    pub(super) fn new(events: mpsc::Receiver<Result<Event, StateError>>) -> Self {
        Self { events }
    }

    /// The next change. Safe to drop while waiting: nothing is lost.
    pub async fn next(&mut self) -> Option<Result<Event, StateError>> {
        self.events.recv().await
    }
}

impl futures::Stream for Watch {
    type Item = Result<Event, StateError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.events.poll_recv(context)
    }
}
