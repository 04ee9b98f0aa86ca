//! The controller's long-lived tasks: each is spawned here under a name, and the stop waits for all of them, so that
//! none outlives the state it writes to. One that does not end says its name.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::task::TaskTracker;

#[derive(Clone, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    running: Arc<Mutex<Running>>,
}

#[derive(Default)]
struct Running {
    next: u64,
    names: BTreeMap<u64, &'static str>,
}

/// Takes the name back, also when the task panics.
struct Name {
    tasks: Tasks,
    number: u64,
    name: &'static str,
}

impl Drop for Name {
    fn drop(&mut self) {
        self.tasks.running.lock().unwrap_or_else(PoisonError::into_inner).names.remove(&self.number);
        if std::thread::panicking() {
            tracing::error!(task = self.name, "a task broke down; the controller should be restarted");
        }
    }
}

impl Tasks {
    /// The task must end soon after the controller's cancellation, by itself.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let number = {
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            running.next += 1;
            let number = running.next;
            running.names.insert(number, name);
            number
        };
        let name = Name { tasks: self.clone(), number, name };
        self.tracker.spawn(async move {
            let _name = name;
            task.await;
        });
    }

    /// Until every task has ended.
    pub async fn ended(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }

    /// Who still runs.
    pub fn stragglers(&self) -> Vec<&'static str> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).names.values().copied().collect()
    }
}
