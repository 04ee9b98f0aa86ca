//! Which gRPC code an error becomes: one place, exhaustive.

use tonic::Status;

use crate::jobs::JobStoreError;
use crate::reconcile::{ReconcileError, in_full};
use crate::resources::ResourceError;
use crate::state::{RowError, StateError};
use crate::wire::WireError;

pub fn of_wire(error: &WireError) -> Status {
    Status::invalid_argument(error.to_string())
}

pub fn of_resource(error: &ResourceError) -> Status {
    Status::invalid_argument(error.to_string())
}

pub fn of_row(error: RowError) -> Status {
    match &error {
        RowError::State(state) => of_state(state),
        RowError::Absent { .. } => Status::not_found(error.to_string()),
        RowError::Exists { .. } => Status::already_exists(error.to_string()),
        RowError::Conflict { .. } => {
            Status::aborted(format!("{error}\nHINT: somebody else was first; look again and repeat the command."))
        }
        RowError::Decode { .. } | RowError::Encode { .. } => internal(&error),
    }
}

fn of_state(error: &StateError) -> Status {
    match error {
        StateError::Closed => Status::unavailable("the controller is stopping"),
        StateError::ValueTooLarge { .. } | StateError::TxnTooLarge { .. } | StateError::TooManyOps { .. } => {
            Status::invalid_argument(format!("{error}\nHINT: apply fewer documents at once."))
        }
        StateError::Locked { .. }
        | StateError::Storage { .. }
        | StateError::Format { .. }
        | StateError::Damaged { .. }
        | StateError::DuplicateKey { .. }
        | StateError::BadKey { .. }
        | StateError::LeaseNotFound { .. }
        | StateError::Compacted { .. }
        | StateError::FutureRevision { .. } => internal(error),
    }
}

pub fn of_job(error: JobStoreError) -> Status {
    match error {
        JobStoreError::NotFound { .. } => Status::not_found(error.to_string()),
        JobStoreError::Contended { .. } => Status::aborted(format!("{error}\nHINT: try again.")),
        JobStoreError::State(error) => of_row(error),
    }
}

pub fn of_reconcile(error: ReconcileError) -> Status {
    match error {
        ReconcileError::Row(error) => of_row(error),
        ReconcileError::Job(error) => of_job(error),
        ReconcileError::Writer(error) => internal(&error),
    }
}

/// The whole chain goes to the log; the caller gets the operation.
fn internal(error: &(dyn std::error::Error + 'static)) -> Status {
    tracing::error!(error = in_full(error), "a call failed");
    Status::internal(format!("{error}\nHINT: the controller's log says more."))
}
