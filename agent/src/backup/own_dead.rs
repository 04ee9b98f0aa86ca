//! Sessions that killed backups of this host left open are ended by its next backup, where no controller does it.
//!
//! The log lets a writer end its own sessions. With the recovery key every host is the same writer, so a run also says
//! which process it is of. Only a process of this very boot and process namespace can be seen to be gone; of any other
//! it is not known, and its session stays as it is. Were it wrong, the other backup's commit would be refused, and no
//! more than that.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use walfleet_repository::backup::commit::abort_dead;
use walfleet_repository::cluster::OpenCluster;
use walfleet_repository::signature::Signer;

/// A process, told from every other one at any time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProcessMark {
    /// The kernel's random id of this boot.
    boot: String,
    /// The process namespace's inode number: containers count their processes anew.
    namespace: u64,
    pid: i32,
    /// In clock ticks since the boot: a later process of the same number has another.
    started: u64,
}

impl ProcessMark {
    /// Of this process; `None` where the kernel does not say.
    pub fn own() -> Option<ProcessMark> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned();
        let namespace = fs::metadata("/proc/self/ns/pid").ok()?.ino();
        let pid = i32::try_from(std::process::id()).ok()?;
        Some(ProcessMark { boot, namespace, pid, started: stat(pid)?.1 })
    }

    /// A run's name with the process that serves it.
    pub fn onto(&self, run: &str) -> String {
        format!("{run} by {self}")
    }

    fn of_run(run: &str) -> Option<ProcessMark> {
        let mut parts = run.rsplit_once(" by ")?.1.split('/');
        let mark = ProcessMark {
            boot: parts.next()?.to_owned(),
            namespace: parts.next()?.parse().ok()?,
            pid: parts.next()?.parse().ok()?,
            started: parts.next()?.parse().ok()?,
        };
        parts.next().is_none().then_some(mark)
    }

    /// Seen from a process of the same boot and namespace. Whatever is doubtful is not gone.
    fn is_gone(&self, own: &ProcessMark) -> bool {
        if (&self.boot, self.namespace) != (&own.boot, own.namespace) {
            return false;
        }
        // A mark comes from the store, and Pid takes no negative number.
        let Some(pid) = Some(self.pid).filter(|pid| *pid > 0).and_then(Pid::from_raw) else { return false };
        match test_kill_process(pid) {
            Err(Errno::SRCH) => true,
            // Another user's process may not show when it was started.
            _ => stat(self.pid).is_some_and(|(state, started)| started != self.started || matches!(state, 'Z' | 'X')),
        }
    }
}

impl fmt::Display for ProcessMark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}/{}", self.boot, self.namespace, self.pid, self.started)
    }
}

/// State and start of a process: fields 3 and 22, counted from behind the name, which may hold anything (proc(5)).
fn stat(pid: i32) -> Option<(char, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// The run of a backup that is taken with the recovery key, named so that a later one can see whether this one died.
/// Others' runs are the controller's, which ends what its agents left.
pub fn name_run(cluster: &OpenCluster, signer: &Signer, run: &str) -> Option<(ProcessMark, String)> {
    let is_root = cluster.repository().root().root_public_key == signer.public_key();
    let mark = ProcessMark::own().filter(|_| is_root)?;
    let run = mark.onto(run);
    Some((mark, run))
}

/// Ends what killed backups of this host left open. A failure is told and keeps no backup from being taken.
pub async fn tidy(cluster: &OpenCluster, signer: &Signer, own: &ProcessMark) {
    let is_gone = |run: &str| ProcessMark::of_run(run).is_some_and(|mark| mark.is_gone(own));
    match abort_dead(cluster, signer, is_gone, "its process on this host is gone").await {
        Ok(ended) => ended.iter().for_each(|session| {
            tracing::info!(%session, "ended a session that a killed backup of this host had left open");
        }),
        Err(error) => tracing::warn!("sessions of killed backups were not looked for: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use walfleet_repository::backup::commit::{BackupSession, SessionSpec};
    use walfleet_repository::cluster_log::{Author, SessionState};
    use walfleet_repository::crypto::RecipientSecret;
    use walfleet_repository::ids::BackupId;
    use walfleet_repository::open::{Repository, RepositorySpec};
    use walfleet_repository::postgres::{Branch, Lsn, SystemId, Timeline, WalBranch};
    use walfleet_repository::store::Store;

    use super::*;

    async fn open(cluster: &OpenCluster, signer: &Arc<Signer>, run: String) -> BackupId {
        let wal = WalBranch { system_id: SystemId(1), timeline: Timeline(1), branch: Branch::ROOT };
        let spec = SessionSpec { run: Some(run), wal, wal_floor: Lsn(1) };
        BackupSession::open(cluster.clone(), signer.clone(), "pg1", spec).await.unwrap().0.id().clone()
    }

    #[tokio::test]
    async fn a_killed_backup_s_session_is_ended_and_no_other() {
        let (signer, _) = Signer::generate();
        let secret = RecipientSecret::generate().unwrap();
        let spec = RepositorySpec { root_public_key: signer.public_key(), recovery_recipient: secret.id() };
        let (repository, _) = Repository::init(Store::in_memory(), spec).await.unwrap();
        let name = "orders".parse().unwrap();
        let cluster =
            OpenCluster::open_or_begin(repository, name, &secret, Author::host(&signer), ("x", None)).await.unwrap();
        let signer = Arc::new(signer);
        let (own, running) = name_run(&cluster, &signer, "job_a").unwrap();
        let killed = ProcessMark { started: own.started - 1, ..own.clone() };
        let other_host = ProcessMark { boot: "another".into(), ..killed.clone() };
        let killed = open(&cluster, &signer, killed.onto("job_b")).await;
        let mut kept = vec![open(&cluster, &signer, running).await];
        kept.push(open(&cluster, &signer, other_host.onto("job_c")).await);
        kept.push(open(&cluster, &signer, "nightly/1".into()).await);
        tidy(&cluster, &signer, &own).await;
        let log = cluster.log().await.unwrap();
        assert!(matches!(log.state().session(&killed).unwrap().state, SessionState::Aborted { .. }));
        assert!(kept.iter().all(|session| log.state().session(session).unwrap().is_open()));
        let (agent, _) = Signer::generate();
        assert_eq!(name_run(&cluster, &agent, "job_a"), None, "an agent's runs are the controller's");
    }

    #[test]
    fn only_a_process_of_this_boot_and_namespace_that_is_no_more_is_gone() {
        let own = ProcessMark::own().unwrap();
        assert_eq!(ProcessMark::of_run(&own.onto("job_a by b")), Some(own.clone()));
        assert_eq!(ProcessMark::of_run("job_a"), None);
        assert!(!own.is_gone(&own));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let mark = ProcessMark { pid, started: stat(pid).unwrap().1, ..own.clone() };
        assert!(!mark.is_gone(&own));
        let earlier = ProcessMark { started: mark.started - 1, ..mark.clone() };
        assert!(earlier.is_gone(&own), "the number was given to another process since");
        child.kill().unwrap();
        while !mark.is_gone(&own) {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(mark.is_gone(&own));
        let elsewhere = [
            ProcessMark { boot: "another".into(), ..mark.clone() },
            ProcessMark { namespace: 1, ..mark.clone() },
            ProcessMark { pid: -1, ..mark },
        ];
        assert!(elsewhere.iter().all(|mark| !mark.is_gone(&own)), "nothing is known of it");
    }
}
