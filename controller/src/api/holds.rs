//! Holds, of `Retention`.

use futures::StreamExt;
use jiff::Timestamp;
use tonic::Status;
use walfleet_proto::operator::v1 as pb;
use walfleet_repository::ids::HoldId;

use super::fleet::find;
use super::retention::{READS, answer, no_backup, place};
use super::{Api, now, reason};
use crate::identity::PeerIdentity;
use crate::keeper::holds::{Held, Terms, Wanted};
use crate::wire::retention::hold_out;

impl Api {
    pub(super) async fn hold(
        &self,
        peer: &PeerIdentity,
        wanted: &pb::PlaceHoldRequest,
    ) -> Result<pb::PlaceHoldReply, Status> {
        let at = now();
        let what = subject(wanted)?;
        let reason = reason(&wanted.reason, "say in a sentence what it is kept for.")?.to_owned();
        let until = (wanted.until_us != 0).then(|| time("until", wanted.until_us)).transpose()?;
        if until.is_some_and(|until| until <= at) {
            return Err(Status::invalid_argument("until: it is over already\nHINT: name a moment to come."));
        }
        let terms = Terms { owner: peer.name.to_string(), reason, until };
        let overview = self.overview().await?;
        let assembly = overview.picture.assemble();
        let cluster = find(&assembly, &wanted.cluster)?;
        let (repository, spec) = place(&overview.picture, cluster)?;
        let placing = self.keeper.place_hold((repository, spec), &cluster.name, (&what, &terms), at);
        match answer(repository, placing).await? {
            Held::Done(holds) => {
                let holds = holds.iter().map(|hold| hold_out(cluster.name.as_str(), repository, hold)).collect();
                Ok(pb::PlaceHoldReply { holds })
            }
            Held::Unknown => Err(no_backup(&wanted.cluster, &wanted.backup)),
            Held::NothingLeft(nothing) => Err(Status::failed_precondition(format!(
                "not all of it is left: {nothing}\nHINT: hold what is left, with --from."
            ))),
            Held::Busy => Err(Status::aborted(
                "the cluster's log was written to meanwhile: some of it may be held, and not all\nHINT: `walfleet hold list` shows it; repeat it.",
            )),
            Held::NotYours => Err(Status::internal("a new hold is somebody's")),
        }
    }

    /// A repository that does not answer hides no other's.
    pub(super) async fn holds(&self, wanted: &str) -> Result<pb::ListHoldsReply, Status> {
        let at = now();
        let overview = self.overview().await?;
        let assembly = overview.picture.assemble();
        let clusters = match wanted {
            "" => assembly.clusters.values().filter(|cluster| cluster.repository.is_some()).collect(),
            name => vec![find(&assembly, name)?],
        };
        let mut places = Vec::new();
        for cluster in clusters {
            let (repository, spec) = place(&overview.picture, cluster)?;
            places.push((cluster.name.clone(), repository.to_owned(), spec.clone()));
        }
        let reads = places.into_iter().map(|(cluster, repository, spec)| async move {
            let holds = answer(&repository, self.keeper.holds((&repository, &spec), &cluster, at)).await?;
            Ok(holds.iter().map(|hold| hold_out(cluster.as_str(), &repository, hold)).collect())
        });
        let read: Vec<Result<Vec<pb::HoldView>, Status>> = futures::stream::iter(reads).buffered(READS).collect().await;
        let mut reply = pb::ListHoldsReply::default();
        for holds in read {
            match holds {
                Ok(holds) => reply.holds.extend(holds),
                Err(status) if wanted.is_empty() => reply.unknown.push(status.message().to_owned()),
                Err(status) => return Err(status),
            }
        }
        Ok(reply)
    }

    pub(super) async fn release(&self, wanted: &pb::ReleaseHoldRequest) -> Result<pb::ReleaseHoldReply, Status> {
        let no_hold = || {
            Status::not_found(format!(
                "there is no hold {:?} of {}\nHINT: `walfleet hold list` shows those there are.",
                wanted.hold, wanted.cluster
            ))
        };
        let hold: HoldId = wanted.hold.parse().map_err(|_| no_hold())?;
        let overview = self.overview().await?;
        let assembly = overview.picture.assemble();
        let cluster = find(&assembly, &wanted.cluster)?;
        let (repository, spec) = place(&overview.picture, cluster)?;
        let released = self.keeper.release_hold((repository, spec), &cluster.name, &hold, now());
        match answer(repository, released).await? {
            Held::Done(holds) => {
                let hold = holds.first().map(|hold| hold_out(cluster.name.as_str(), repository, hold));
                Ok(pb::ReleaseHoldReply { hold })
            }
            Held::NotYours => Err(Status::failed_precondition(format!(
                "hold {hold} keeps the content that a copy of {} refers to\nHINT: it goes when that copy's backups no longer need it.",
                cluster.name
            ))),
            Held::Unknown | Held::NothingLeft(_) | Held::Busy => Err(no_hold()),
        }
    }
}

fn subject(wanted: &pb::PlaceHoldRequest) -> Result<Wanted, Status> {
    match (wanted.backup.as_str(), wanted.from_us) {
        ("", 0) => Err(Status::invalid_argument(
            "neither a backup nor a stretch of time is named\nHINT: --backup, or --from and --to.",
        )),
        ("", _) => {
            let from = time("from", wanted.from_us)?;
            let to = (wanted.to_us != 0).then(|| time("to", wanted.to_us)).transpose()?;
            if to.is_some_and(|to| to < from) {
                return Err(Status::invalid_argument("to: it lies before from"));
            }
            Ok(Wanted::Stretch { from, to })
        }
        (backup, 0) if wanted.to_us == 0 => {
            let backup = backup.parse().map_err(|_| no_backup(&wanted.cluster, backup))?;
            Ok(Wanted::Backup(backup))
        }
        _ => Err(Status::invalid_argument(
            "a backup and a stretch of time are named\nHINT: one hold keeps either; place two.",
        )),
    }
}

fn time(field: &str, us: i64) -> Result<Timestamp, Status> {
    Timestamp::from_microsecond(us).map_err(|_| Status::invalid_argument(format!("{field}: {us} us is no time")))
}
