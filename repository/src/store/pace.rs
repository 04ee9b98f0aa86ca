//! A hook for whoever holds bulk work back: asked before bytes go to a store or come from it.

use futures::future::BoxFuture;

/// The work that asked was given up: it is to end, without what it waited for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stopped;

/// Says when. Of a store that has none, nothing waits.
pub trait Pace: Send + Sync + 'static {
    /// Waits until so many bytes may be sent. Packs wait on tasks of their own, which nobody drops: hence the answer.
    fn upload(&self, bytes: u64) -> BoxFuture<'_, Result<(), Stopped>>;
    /// Waits until so many bytes may be fetched, or may have been, where their number is not known before. Whoever no
    /// longer wants them drops it.
    fn download(&self, bytes: u64) -> BoxFuture<'_, ()>;
}
