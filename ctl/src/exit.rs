//! The documented exit codes and the only two places where something becomes one: a gRPC status and a job's outcome.

use tonic::Code;

/// What the process ends with. The numbers are a contract with scripts (`docs`: the command line): never renumber.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    Done = 0,
    Failed = 1,
    Usage = 2,
    NotFound = 3,
    /// Role, lock, hold or unsafe.
    Refused = 4,
    Unreachable = 5,
    /// The wait ended; the job goes on.
    TimedOut = 6,
    /// Not recoverable as asked; the message says what is.
    NotRecoverable = 7,
}

impl Exit {
    pub const ALL: [Exit; 8] = [
        Exit::Done,
        Exit::Failed,
        Exit::Usage,
        Exit::NotFound,
        Exit::Refused,
        Exit::Unreachable,
        Exit::TimedOut,
        Exit::NotRecoverable,
    ];

    pub fn code(self) -> u8 {
        self as u8
    }

    /// Of a call that the controller answered, or that never reached it.
    pub fn of_status(code: Code) -> Exit {
        match code {
            Code::Ok => Exit::Done,
            Code::InvalidArgument => Exit::Usage,
            Code::NotFound => Exit::NotFound,
            Code::PermissionDenied
            | Code::Unauthenticated
            | Code::FailedPrecondition
            | Code::AlreadyExists
            | Code::ResourceExhausted
            | Code::Unimplemented => Exit::Refused,
            // A deadline that passed without an answer is a controller out of reach, not a job that goes on.
            Code::Unavailable | Code::DeadlineExceeded => Exit::Unreachable,
            // The controller says it when a target lies outside of every recovery window.
            Code::OutOfRange => Exit::NotRecoverable,
            Code::Cancelled | Code::Unknown | Code::Aborted | Code::Internal | Code::DataLoss => Exit::Failed,
        }
    }

    /// Of a job that ended without success. The agent names the code; what is not a documented failure is 1.
    pub fn of_failed_job(exit_code: i64) -> Exit {
        Exit::ALL
            .into_iter()
            .find(|exit| *exit != Exit::Done && i64::from(exit.code()) == exit_code)
            .unwrap_or(Exit::Failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_exit_code_is_the_documented_number() {
        let numbers: Vec<u8> = Exit::ALL.iter().map(|exit| exit.code()).collect();
        assert_eq!(numbers, [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn a_failed_job_never_ends_in_success() {
        for code in [0, -1, 8, 255, i64::MAX, i64::MIN] {
            assert_eq!(Exit::of_failed_job(code), Exit::Failed, "{code}");
        }
        assert_eq!(Exit::of_failed_job(7), Exit::NotRecoverable);
    }

    #[test]
    fn every_grpc_status_has_an_exit_code_and_only_ok_is_success() {
        for number in 0..=16 {
            let code = Code::from_i32(number);
            assert_eq!(Exit::of_status(code) == Exit::Done, code == Code::Ok, "{code:?}");
        }
    }
}
