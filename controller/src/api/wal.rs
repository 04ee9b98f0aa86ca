//! `Wal`: what operators say of a cluster's WAL.

use std::time::Duration;

use tonic::{Request, Response, Status};
use walfleet_proto::operator::v1 as pb;
use walfleet_proto::operator::v1::wal_server::Wal;
use walfleet_repository::postgres::Lsn;

use super::fleet::find;
use super::{Api, now, reason};
use crate::fleet::clusters::ClusterSeen;
use crate::fleet::protection::windows;
use crate::fleet::recovery::{GapNote, WalGap};
use crate::identity::{PeerIdentity, peer};
use crate::keeper::gaps::Acknowledgement;
use crate::reconcile::in_full;
use crate::wire::recovery::gap_out;

/// For the repository's answer: less than callers wait for ours.
const STORE: Duration = Duration::from_secs(20);

impl Api {
    async fn acknowledge(
        &self,
        peer: &PeerIdentity,
        wanted: &pb::AcknowledgeGapRequest,
    ) -> Result<pb::AcknowledgeGapReply, Status> {
        let reason = reason(&wanted.reason, "say in a sentence why the gap is no alarm.")?;
        let parsed = |field: &str, text: &str| {
            text.parse::<Lsn>().map_err(|error| Status::invalid_argument(format!("{field}: {error}")))
        };
        let (from, to) = (parsed("from_lsn", &wanted.from_lsn)?, parsed("to_lsn", &wanted.to_lsn)?);
        let overview = self.overview().await?;
        let assembly = overview.picture.assemble();
        let cluster = find(&assembly, &wanted.cluster)?;
        let (repository, gap) = the_gap(cluster, (from, to), (wanted.timeline, &wanted.branch))?;
        let spec = overview.picture.catalog.repositories.get(repository).ok_or_else(|| {
            Status::not_found(format!(
                "repository {repository:?} is not declared\nHINT: `walfleet repository list` shows those there are."
            ))
        })?;
        let note = GapNote { by: peer.name.to_string(), at: now(), reason: reason.to_owned() };
        let system_identifier = Some(gap.system_identifier).filter(|id| *id != 0).or(cluster.system_identifier);
        let said = Acknowledgement { cluster: &cluster.name, gap, system_identifier, note: &note };
        match tokio::time::timeout(STORE, self.keeper.acknowledge(repository, spec, &said)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                let error = in_full(&error);
                return Err(Status::unavailable(format!("repository {repository}: {error}\nHINT: try again.")));
            }
            Err(_) => {
                let seconds = STORE.as_secs();
                return Err(Status::deadline_exceeded(format!(
                    "repository {repository} did not answer within {seconds} s, so it may be acknowledged or not\nHINT: repeat it."
                )));
            }
        }
        let gap = WalGap { acknowledged: true, acknowledgement: Some(note), ..gap.clone() };
        Ok(pb::AcknowledgeGapReply { repository: repository.to_owned(), gap: Some(gap_out(&gap)) })
    }
}

/// The one gap that begins and ends there, as the agents saw it last. Timeline 0, or an empty branch: whichever.
fn the_gap<'s>(
    cluster: &'s ClusterSeen<'_>,
    (from, to): (Lsn, Lsn),
    (timeline, branch): (u32, &str),
) -> Result<(&'s str, &'s WalGap), Status> {
    let gaps: Vec<(&str, &WalGap)> = windows(cluster)
        .into_iter()
        .flat_map(|window| window.gaps.iter().map(|gap| (window.repository.as_str(), gap)))
        .collect();
    let begins = |(_, gap): &&(&str, &WalGap)| {
        gap.from_lsn == from && (timeline == 0 || gap.timeline == timeline) && gap.branch.starts_with(branch)
    };
    let fitting: Vec<&(&str, &WalGap)> = gaps.iter().filter(begins).collect();
    let mut ends_there = fitting.iter().filter(|(_, gap)| gap.to_lsn == to);
    if let (Some(only), None) = (ends_there.next(), ends_there.next()) {
        return Ok(**only);
    }
    match fitting.as_slice() {
        [(_, gap)] => Err(Status::failed_precondition(format!(
            "the gap of {} that begins at {from} ends at {}, not at {to}\nHINT: if that is known, too: `walfleet wal gaps {} acknowledge --from {from} --to {} --reason …`.",
            cluster.name, gap.to_lsn, cluster.name, gap.to_lsn
        ))),
        [] => {
            let known: Vec<String> = gaps.iter().map(|(_, gap)| gap.from_lsn.to_string()).collect();
            let known =
                if known.is_empty() { "none is known".to_owned() } else { format!("known: {}", known.join(", ")) };
            Err(Status::not_found(format!(
                "no gap of {} begins at {from} ({known})\nHINT: `walfleet wal gaps {}` shows where they begin.",
                cluster.name, cluster.name
            )))
        }
        several => {
            let names: Vec<String> =
                several.iter().map(|(_, gap)| format!("{}-{}", gap.timeline, gap.branch)).collect();
            Err(Status::failed_precondition(format!(
                "{} gaps of {} begin at {from}, on timelines {}\nHINT: say which with --timeline.",
                several.len(),
                cluster.name,
                names.join(", ")
            )))
        }
    }
}

#[tonic::async_trait]
impl Wal for Api {
    async fn acknowledge_gap(
        &self,
        request: Request<pb::AcknowledgeGapRequest>,
    ) -> Result<Response<pb::AcknowledgeGapReply>, Status> {
        let peer = peer(&request)?;
        let wanted = request.into_inner();
        let result = self.acknowledge(&peer, &wanted).await;
        let object = format!("cluster {}, gap {}", wanted.cluster, wanted.from_lsn);
        self.audited(&peer, "Wal.AcknowledgeGap", &object, result).await.map(Response::new)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use jiff::Timestamp;

    use super::*;
    use crate::fleet::clusters::MemberSeen;
    use crate::fleet::recovery::RecoveryWindow;
    use crate::fleet::samples;
    use crate::policy::Binding;

    #[test]
    fn a_gap_that_has_grown_since_somebody_looked_is_not_the_one_that_is_meant() {
        let mut instance = samples::instance("orders", 7);
        instance.windows = vec![RecoveryWindow {
            repository: "main".to_owned(),
            as_of: Timestamp::UNIX_EPOCH,
            ranges: vec![],
            gaps: vec![
                samples::gap((0x300, 0x500), 1),
                samples::gap((0x700, 0x800), 1),
                samples::gap((0x700, 0x900), 2),
                WalGap { branch: "0000000000000000".to_owned(), ..samples::gap((0xB00, 0xC00), 1) },
                WalGap { branch: "abababababababab".to_owned(), ..samples::gap((0xB00, 0xC00), 1) },
            ],
            filled: vec![],
            newest_commit: None,
            newest_lsn: None,
            newest_timeline: 1,
        }];
        let at = Timestamp::UNIX_EPOCH;
        let cluster = ClusterSeen {
            name: "orders".parse().expect("a name"),
            labels: BTreeMap::new(),
            system_identifier: Some(7),
            spec: None,
            members: vec![MemberSeen {
                agent: "db1",
                instance: &instance,
                facts_at: at,
                received_at: at,
                connected: true,
                vouches: true,
            }],
            binding: Binding::Unbound,
            is_surely_bound: true,
            policy: None,
            repository: Some("main"),
            problems: vec![],
        };
        let found = |from, to, which| the_gap(&cluster, (Lsn(from), Lsn(to)), which).map(|(_, gap)| gap.to_lsn);
        let whichever = (0, "");
        assert_eq!(found(0x300, 0x500, whichever).expect("it is that one"), Lsn(0x500));
        let refused = found(0x300, 0x400, whichever).expect_err("it has grown");
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
        let types = "`walfleet wal gaps orders acknowledge --from 0/300 --to 0/500 --reason …`";
        assert!(refused.message().contains(types), "{refused}");
        assert_eq!(found(0x100, 0x500, whichever).expect_err("none begins there").code(), tonic::Code::NotFound);
        assert_eq!(found(0x700, 0x900, whichever).expect("one ends there"), Lsn(0x900));
        assert!(found(0x700, 0xA00, whichever).is_err_and(|status| status.message().contains("--timeline")));
        assert_eq!(found(0x700, 0x900, (2, "")).expect("with its timeline"), Lsn(0x900));
        // On two branches of one timeline.
        let refused = found(0xB00, 0xC00, (1, "")).expect_err("which of them?");
        assert!(refused.message().contains("timelines 1-0000000000000000, 1-abababababababab"), "{refused}");
        assert_eq!(found(0xB00, 0xC00, (1, "ab")).expect("with its branch"), Lsn(0xC00));
    }
}
