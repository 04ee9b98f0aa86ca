//! Puts orders and desired states on the streams that this controller holds. Everything here is said again until the
//! agent's answer makes it needless, so that nothing depends on one message.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::SignedDuration;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use walfleet_repository::ids::JobId;

use super::desired::{self, DesiredContent, DesiredSpec};
use super::spools::{self, Former};
use super::writers::{self, WriterChain};
use super::{Picture, ReconcileError, Reconciler};
use crate::fleet::clusters::Assembly;
use crate::fleet::{LinkId, ToAgent};
use crate::jobs::{FencingToken, Job, Phase};
use crate::state::{Row, RowError};

/// What was said last to which stream, and when.
pub type Delivered = BTreeMap<(JobId, FencingToken, Said), (LinkId, Instant)>;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Said {
    Offer,
    Cancel,
}

/// Sends offers and cancels that wait for an answer, and stops attempts that nobody waits for any more.
pub fn orders(reconciler: &Reconciler, jobs: &[Job], delivered: &mut Delivered) {
    delivered.retain(|_, (_, at)| at.elapsed() < reconciler.fleet.timing.offer);
    let mut say = |agent: &str, id: &JobId, token: FencingToken, said: Said, message: &dyn Fn() -> ToAgent| {
        let Some(link) = reconciler.fleet.link(agent) else { return };
        let key = (id.clone(), token, said);
        if delivered.get(&key).is_none_or(|(to, _)| *to != link.id()) {
            link.send(message());
            delivered.insert(key, (link.id(), Instant::now()));
        }
    };
    for job in jobs {
        let Some(agent) = job.held_by() else { continue };
        let cancel = || ToAgent::Cancel { job: job.id.clone(), token: job.token };
        match (job.phase(), &job.cancel) {
            (Phase::Offered | Phase::Running, Some(_)) => say(agent, &job.id, job.token, Said::Cancel, &cancel),
            (Phase::Offered, None) => {
                say(agent, &job.id, job.token, Said::Offer, &|| ToAgent::Offer(Box::new(job.clone())));
            }
            _ => {}
        }
    }
    for (agent, id, token) in reconciler.fleet.all_running() {
        // An attempt that ended here (cancelled while its agent was away, or replaced) and still runs there. One whose
        // job waits is left alone: it was thought lost, and its sign of life brings it back.
        if !jobs.iter().any(|job| job.id == id && job.token == token) {
            say(&agent, &id, token, Said::Cancel, &|| ToAgent::Cancel { job: id.clone(), token });
        }
    }
}

const PREFIX: &str = "desired/";

/// What an agent was last told, so that a generation stands for one content, through restarts.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Told {
    generation: u64,
    content: DesiredContent,
    writer: WriterChain,
}

/// Rows as this controller last wrote or read them, so that a quiet fleet costs no reads.
pub type KnownTold = BTreeMap<String, Row<Told>>;

/// Of members that are away as well: their links to their peers may stand.
async fn former_peers(
    reconciler: &Reconciler,
    assembly: &Assembly<'_>,
    known: &mut KnownTold,
) -> Result<Former, ReconcileError> {
    let mut former = Former::new();
    for (cluster, member) in spools::members(assembly) {
        if !known.contains_key(&member)
            && let Some(row) = reconciler.state.row::<Told>(&format!("{PREFIX}{member}")).await?
        {
            known.insert(member.clone(), row);
        }
        let told = known.get(&member).into_iter().flat_map(|row| &row.value.content.clusters);
        let peer = told.filter(|told| told.name == cluster.name).find_map(|told| told.spool_peer.as_ref());
        if let Some(peer) = peer {
            former.insert((cluster.name.clone(), member), peer.agent.clone());
        }
    }
    Ok(former)
}

/// Works out every connected agent's desired state, stores what changed, and sends it. Says how many changed.
pub async fn desired(
    reconciler: &Reconciler,
    picture: &Picture,
    assembly: &Assembly<'_>,
    jobs: &[Job],
    known: &mut KnownTold,
) -> Result<usize, ReconcileError> {
    let mut changed = 0;
    let former = former_peers(reconciler, assembly, known).await?;
    let mut contents = desired::plan(assembly, &picture.agents, &picture.catalog, jobs);
    spools::name_peers(picture.now, assembly, &picture.agents, &picture.catalog, &former, &mut contents);
    for (agent, content) in contents {
        let Some(link) = reconciler.fleet.link(&agent) else { continue };
        let member = agent.parse().ok().and_then(|name| reconciler.roster.member(&name));
        let Some(member) = member.filter(|member| member.revoked_at_us.is_none()) else { continue };
        let key = format!("{PREFIX}{agent}");
        if !known.contains_key(&agent)
            && let Some(row) = reconciler.state.row::<Told>(&key).await?
        {
            known.insert(agent.clone(), row);
        }
        let row = known.get(&agent);
        let told = row.map(|row| &row.value);
        let clusters = content.member_of();
        let lifetime = SignedDuration::try_from(reconciler.fleet.timing.writer).unwrap_or(SignedDuration::MAX);
        let last = told.map(|told| &told.writer);
        let writer = writers::chain(&reconciler.keeper, &member, clusters, last, lifetime, picture.now)?;
        let generation = match told.filter(|told| told.content == content && told.writer == writer) {
            Some(told) => told.generation,
            None => {
                let generation = told.map_or(0, |told| told.generation) + 1;
                let fresh = Told { generation, content: content.clone(), writer: writer.clone() };
                // Durable before it is said: an agent never sees two contents under one generation.
                let revision = row.map_or(0, |row| row.mod_revision);
                let written = reconciler.state.update_row(&key, revision, &fresh).await;
                // What was known is not so any more, whatever came of it.
                known.remove(&agent);
                match written {
                    Ok(_) => changed += 1,
                    Err(RowError::Conflict { .. }) => continue,
                    Err(error) => return Err(error.into()),
                }
                generation
            }
        };
        link.desire(Arc::new(DesiredSpec { generation, content, writer_chain: writer.certificates }));
    }
    Ok(changed)
}
