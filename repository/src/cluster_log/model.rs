//! Model check of the log's protocol on the real fold.
//!
//! Agents open, upload, commit, stall for ever, lose replies and use session ids again; the keeper expires, purges, brings
//! back, aborts, holds, trims and returns whatever the fold lets it; collectors plan at one prefix and delete at any later
//! time. Every interleaving is visited, and with each rule dropped in turn the search must find how things go wrong, or
//! the rule is not needed. (After `log_model.py` of the design, where agents checked rules that here only the fold checks.)

mod anyone;

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use anyone::try_anything;

use super::fold::{Rule, Verdict};
use super::state::{ClusterState, Session, SessionState};
use crate::format::log_entry::{Action, Entry, HeldStretch, Hold, HoldSubject, Open};
use crate::ids::{BackupId, ClusterName, Digest, DomainId, HoldId};
use crate::postgres::{Branch, Lsn, SystemId, Timeline, WalBranch};
use crate::signature::{PublicKey, Writer};

/// Sessions by number: 0 is committed from the start, agents run the others.
const SESSIONS: [&str; 4] = ["bk_0", "bk_1", "bk_2", "bk_3"];
/// A backup of another cluster, borrowed from the start.
const FOREIGN: &str = "bk_x";
/// Bits of objects: session n's pack is bit n, the borrowed backup's is this.
const FOREIGN_PACK: u8 = 1 << 7;
/// The WAL that there is: one segment for each position.
const POSITIONS: std::ops::RangeInclusive<u64> = 1..=3;

pub(super) fn cluster() -> ClusterName {
    "orders".parse().unwrap()
}

fn lender() -> ClusterName {
    "lender".parse().unwrap()
}

fn id(name: &str) -> BackupId {
    name.parse().unwrap()
}

fn hold_id(name: &str) -> HoldId {
    name.parse().unwrap()
}

pub(super) fn branch() -> WalBranch {
    WalBranch { system_id: SystemId(7), timeline: Timeline(1), branch: Branch::ROOT }
}

pub(super) fn open(session: &str, parent: Option<&str>, run: Option<&str>, floor: u64) -> Action {
    Action::Open(Open {
        session: id(session),
        parents: parent.map(id).into_iter().collect(),
        run: run.map(str::to_owned),
        wal: branch(),
        wal_floor: Lsn(floor),
    })
}

pub(super) fn commit(session: &str) -> Action {
    Action::Commit { session: id(session), manifest_digest: Digest([1; 32]), reference_digest: Digest([2; 32]) }
}

fn hold(name: &str, subject: HoldSubject) -> Action {
    Action::Hold(Hold { hold: hold_id(name), subject, reason: String::new(), owner: String::new(), until_us: None })
}

fn begin() -> Action {
    Action::Begin { domain: DomainId([1; 16]), key_commitment: [1; 32] }
}

fn root() -> Writer {
    Writer::root(PublicKey([0; 32]))
}

fn entry(state: &ClusterState, action: Action, keeper_epoch: u64) -> Entry {
    Entry { cluster: cluster(), sequence: state.next(), nonce: [0; 16], at_us: 5, keeper_epoch, action }
}

/// Leaves out in which order accepted entries came, on which no rule depends, so that like states meet.
fn without_order(mut state: ClusterState) -> ClusterState {
    (state.next, state.voids) = (0, 0);
    for session in state.sessions.values_mut() {
        session.opened.sequence = 0;
        match &mut session.state {
            SessionState::Live(committed) => committed.stamp.sequence = 0,
            SessionState::Expired(committed, expiry) => (committed.stamp.sequence, expiry.stamp.sequence) = (0, 0),
            SessionState::Open | SessionState::Aborted { .. } | SessionState::Purged => {}
        }
    }
    state
}

/// An entry that someone may try to append.
#[derive(Clone)]
pub(super) struct Attempt {
    pub action: Action,
    pub writer: Writer,
    pub keeper_epoch: u64,
}

/// States of the fold by number, each transition computed once.
struct Folds {
    states: Vec<ClusterState>,
    numbers: HashMap<ClusterState, u32>,
    attempts: Vec<Attempt>,
    known: HashMap<(u32, usize), Option<u32>>,
}

impl Folds {
    fn new(start: ClusterState, attempts: Vec<Attempt>) -> Folds {
        let start = without_order(start);
        Folds { numbers: [(start.clone(), 0)].into(), states: vec![start], attempts, known: HashMap::new() }
    }

    fn state(&self, number: u32) -> &ClusterState {
        &self.states[number as usize]
    }

    /// What the attempt leads to; `None`: it would be void.
    fn step(&mut self, from: u32, attempt: usize) -> Option<u32> {
        if let Some(known) = self.known.get(&(from, attempt)) {
            return *known;
        }
        let mut state = self.state(from).clone();
        let Attempt { action, writer, keeper_epoch } = &self.attempts[attempt];
        let entry = entry(&state, action.clone(), *keeper_epoch);
        let verdict = state.apply(&entry, writer);
        let to = (verdict == Verdict::Accepted).then(|| self.number(without_order(state)));
        self.known.insert((from, attempt), to);
        to
    }

    fn number(&mut self, state: ClusterState) -> u32 {
        let next = self.states.len() as u32;
        let number = *self.numbers.entry(state.clone()).or_insert(next);
        if number == next {
            self.states.push(state);
        }
        number
    }
}

/// One way to look at the protocol: which moves are tried beside the agents'.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum View {
    /// Expiry, trash and two collectors.
    Packs,
    /// Trims and holds.
    Wal,
    /// A parent that another cluster lends.
    Borrowing,
    /// Two sessions that serve one scheduled run.
    Runs,
}

/// Each view with as many agents as a complete search in seconds allows, and as few as show what it is about.
const WHOLE: [(View, usize); 4] = [(View::Packs, 3), (View::Wal, 1), (View::Borrowing, 2), (View::Runs, 2)];
const BRIEF: [(View, usize); 4] = [(View::Packs, 2), (View::Wal, 1), (View::Borrowing, 1), (View::Runs, 2)];

/// Everything there is, in one moment.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct World {
    fold: u32,
    agents: [Agent; 3],
    /// Packs and WAL in the store.
    objects: u8,
    /// What each collector still means to delete.
    plans: [u8; 2],
    /// The hold in the lender's log was released, and the lender collected.
    lender_let_go: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Agent {
    step: Step,
    /// Packs its backup refers to.
    refs: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Step {
    Idle,
    Opened,
    Uploaded,
    Done,
}

struct Model {
    folds: Folds,
}

impl Model {
    fn new(view: View, agents: usize, dropped: Option<Rule>) -> Model {
        let by = |action| Attempt { action, writer: root(), keeper_epoch: 0 };
        let mut start = ClusterState { dropped, ..ClusterState::default() };
        let lend = Action::Borrow { cluster: lender(), backup: id(FOREIGN), hold: hold_id("hold_x") };
        for action in [begin(), open(SESSIONS[0], None, None, 1), commit(SESSIONS[0]), lend] {
            let entry = entry(&start, action, 0);
            assert_eq!(start.apply(&entry, &root()), Verdict::Accepted);
        }
        Model { folds: Folds::new(start, attempts(view, agents).into_iter().map(by).collect()) }
    }

    fn start(&self) -> World {
        let idle = Agent { step: Step::Idle, refs: 0 };
        World { fold: 0, agents: [idle; 3], objects: 1 | FOREIGN_PACK | from(1), plans: [0; 2], lender_let_go: false }
    }

    fn refs(&self, world: &World, session: &str) -> u8 {
        match SESSIONS.iter().position(|name| *name == session) {
            Some(0) => 1,
            Some(n) => world.agents[n - 1].refs,
            None => FOREIGN_PACK,
        }
    }

    /// What a collector at this prefix must leave alone.
    fn live(&self, world: &World) -> u8 {
        let state = self.folds.state(world.fold);
        let roots = state.sessions().map(|session| match session.state {
            SessionState::Live(_) | SessionState::Expired(..) => self.needs(world, session),
            SessionState::Open => {
                let parents = session.open.parents.iter().map(|parent| self.refs(world, parent.as_str()));
                let own = own_pack(session.id().as_str()) | from(session.open.wal_floor.0);
                parents.fold(own, |objects, more| objects | more)
            }
            SessionState::Aborted { .. } | SessionState::Purged => 0,
        });
        let held = state.holds().map(|hold| held_wal(state, hold));
        roots.chain(held).fold(0, |objects, more| objects | more)
    }

    /// What a backup is made of: its packs, and the segment that makes it consistent.
    fn needs(&self, world: &World, session: &Session) -> u8 {
        self.refs(world, session.id().as_str()) | segment(session.open.wal_floor.0)
    }

    fn trimmed(&self, world: &World) -> u8 {
        from(1) & !from(self.folds.state(world.fold).trimmed_below(&branch()).0)
    }

    /// Every world one move away.
    fn next(&mut self, world: &World) -> Vec<World> {
        let mut next = Vec::new();
        for attempt in 0..self.folds.attempts.len() {
            let action = self.folds.attempts[attempt].action.clone();
            if let Some(before) = self.ready(world, &action)
                && let Some(fold) = self.folds.step(world.fold, attempt)
            {
                self.after(World { fold, ..before }, &action, &mut next);
            }
        }
        for (n, agent) in world.agents.iter().enumerate() {
            if agent.step == Step::Opened {
                let mut uploaded = *world;
                uploaded.agents[n].step = Step::Uploaded;
                uploaded.objects |= own_pack(SESSIONS[n + 1]);
                next.push(uploaded);
            }
        }
        self.collect(world, &mut next);
        let lent = self.folds.state(world.fold).borrowed().next().is_some();
        if !lent && !world.lender_let_go {
            next.push(World { objects: world.objects & !FOREIGN_PACK, lender_let_go: true, ..*world });
        }
        next
    }

    /// Whether whoever would append this may get to it, and what he knows when he does.
    fn ready(&self, world: &World, action: &Action) -> Option<World> {
        let mut world = *world;
        match action {
            Action::Open(open) => {
                let n = agent_of(&open.session)?;
                let parents = open.parents.iter().map(|parent| self.refs(&world, parent.as_str()));
                let refs = parents.fold(own_pack(open.session.as_str()), |packs, more| packs | more);
                let agent = &mut world.agents[n];
                // An agent that was aborted may begin again under the same id, with what it has uploaded already.
                let step = if agent.step == Step::Idle { Step::Opened } else { agent.step };
                *agent = Agent { step, refs };
                Some(world)
            }
            Action::Commit { session, .. } => {
                let uploaded = matches!(world.agents[agent_of(session)?].step, Step::Uploaded);
                uploaded.then_some(world)
            }
            _ => Some(world),
        }
    }

    fn after(&self, world: World, action: &Action, next: &mut Vec<World>) {
        if let Action::Commit { session, .. } = action
            && let Some(n) = agent_of(session)
        {
            let mut done = world;
            done.agents[n].step = Step::Done;
            next.push(done);
        }
        // For a commit: its reply was lost, and the agent will try again.
        next.push(world);
    }

    fn collect(&self, world: &World, next: &mut Vec<World>) {
        let closed = self.folds.state(world.fold).sessions().filter(|session| !session.is_open());
        let closed = closed.fold(0, |packs, session| packs | own_pack(session.id().as_str()));
        let dead = world.objects & !self.live(world) & (closed | self.trimmed(world));
        for collector in 0..world.plans.len() {
            let planned = world.plans[collector];
            let mut after = *world;
            if planned == 0 && dead != 0 {
                after.plans[collector] = dead;
                next.push(after);
            } else if planned != 0 {
                let lowest = planned & planned.wrapping_neg();
                after.plans[collector] = planned & !lowest;
                after.objects &= !lowest;
                next.push(after);
            }
        }
    }

    /// What must hold in every world.
    fn broken(&self, world: &World) -> Option<String> {
        let state = self.folds.state(world.fold);
        let mut runs = HashSet::new();
        for session in state.sessions() {
            let name = session.id().as_str();
            if session.committed().is_some() && self.needs(world, session) & !world.objects != 0 {
                return Some(format!("backup {name} needs packs or WAL that are gone"));
            }
            let purged = |parent: &BackupId| state.session(parent).is_some_and(|parent| parent.committed().is_none());
            if session.is_open() && session.open.parents.iter().any(purged) {
                return Some(format!("open session {name} compares with a backup whose manifest may be gone"));
            }
            if session.is_open() && from(session.open.wal_floor.0) & !world.objects != 0 {
                return Some(format!("open session {name} needs WAL that is gone"));
            }
            if let Some(run) = &session.open.run
                && session.needs_content()
                && !runs.insert(run)
            {
                return Some(format!("run {run} is served twice"));
            }
        }
        let is_gone = |backup: &&BackupId| state.session(backup).is_none_or(|held| held.committed().is_none());
        state.holds().find_map(|hold| match hold.backup().filter(is_gone) {
            Some(backup) => Some(format!("held backup {backup} is gone")),
            None => (held_wal(state, hold) & !world.objects != 0).then(|| "held WAL is gone".to_owned()),
        })
    }

    /// Visits every world. Ends with how many there are, or with what went wrong first.
    fn explore(&mut self) -> Result<usize, String> {
        let start = self.start();
        // Worlds by 64 bits of their hash: of a few hundred thousand, two meet once in hundreds of millions of runs.
        let hash = |world: &World| {
            let mut hasher = DefaultHasher::new();
            world.hash(&mut hasher);
            hasher.finish()
        };
        let mut seen = HashSet::from([hash(&start)]);
        let mut queue = VecDeque::from([start]);
        while let Some(world) = queue.pop_front() {
            if let Some(what) = self.broken(&world) {
                return Err(what);
            }
            for next in self.next(&world) {
                if seen.insert(hash(&next)) {
                    queue.push_back(next);
                }
            }
        }
        Ok(seen.len())
    }
}

/// The segment that begins at a position.
fn segment(position: u64) -> u8 {
    if POSITIONS.contains(&position) { 1 << (3 + position) } else { 0 }
}

/// All from a position on.
fn from(position: u64) -> u8 {
    (position..=*POSITIONS.end()).fold(0, |segments, at| segments | segment(at))
}

fn held_wal(state: &ClusterState, hold: &Hold) -> u8 {
    match &hold.subject {
        HoldSubject::Wal { start, end, .. } => from(start.0) & !from(end.0),
        HoldSubject::Stretch(stretch) => {
            let floor = state.session(&stretch.base).map_or(0, |base| from(base.open.wal_floor.0));
            floor & !stretch.end.map_or(0, |end| from(end.0))
        }
        HoldSubject::Backup(_) => 0,
    }
}

fn own_pack(session: &str) -> u8 {
    SESSIONS.iter().position(|name| *name == session).map_or(0, |n| 1 << n)
}

fn agent_of(session: &BackupId) -> Option<usize> {
    SESSIONS.iter().position(|name| *name == session.as_str())?.checked_sub(1)
}

fn attempts(view: View, agents: usize) -> Vec<Action> {
    let floors: &[u64] = if view == View::Wal { &[1, 2, 3] } else { &[1] };
    let run = (view == View::Runs).then_some("nightly");
    let sessions = &SESSIONS[..=agents];
    let mut attempts = Vec::new();
    for session in &sessions[1..] {
        let mut parents: Vec<_> = sessions.iter().filter(|parent| *parent != session).copied().map(Some).collect();
        match view {
            View::Packs | View::Runs => {}
            View::Wal => parents.push(None),
            View::Borrowing => parents.push(Some(FOREIGN)),
        }
        for parent in parents {
            attempts.extend(floors.iter().map(|floor| open(session, parent, run, *floor)));
        }
        attempts.push(commit(session));
        attempts.push(Action::Abort { session: id(session), reason: String::new() });
    }
    for backup in sessions.iter().map(|name| id(name)) {
        attempts.push(Action::Expire { backup: backup.clone(), reason: String::new() });
        attempts.push(Action::Purge { backup: backup.clone() });
        if view == View::Packs {
            attempts.push(Action::Undelete { backup });
        }
    }
    match view {
        View::Packs | View::Runs => {}
        View::Borrowing => attempts.push(Action::Return { cluster: lender(), backup: id(FOREIGN) }),
        View::Wal => {
            attempts.extend([2, 3].map(|lsn| Action::Trim { branch: branch(), lsn: Lsn(lsn) }));
            attempts.push(hold("hold_b", HoldSubject::Backup(id(SESSIONS[0]))));
            attempts.push(hold("hold_w", HoldSubject::Wal { branch: branch(), start: Lsn(2), end: Lsn(3) }));
            let stretch = HeldStretch { base: id(SESSIONS[1]), end: Some(Lsn(3)), from_us: 0, to_us: None };
            attempts.push(hold("hold_s", HoldSubject::Stretch(stretch)));
            attempts.extend(["hold_b", "hold_w", "hold_s"].map(|hold| Action::Release { hold: hold_id(hold) }));
        }
    }
    attempts
}

#[test]
fn no_interleaving_breaks_what_the_log_promises() {
    for (view, agents) in WHOLE {
        let worlds = Model::new(view, agents, None).explore().unwrap_or_else(|what| panic!("{view:?}: {what}"));
        println!("{view:?}: {worlds} worlds");
        assert!(worlds > 1000, "{view:?}: {worlds} worlds are too few to mean anything");
    }
    let states = try_anything(None).unwrap();
    assert!(states > 100, "{states}");
}

#[test]
fn every_rule_dropped_lets_something_break() {
    for rule in Rule::ALL {
        let mut by_protocol = BRIEF.iter().filter_map(|(view, n)| Model::new(*view, *n, Some(rule)).explore().err());
        let found = by_protocol.next().or_else(|| try_anything(Some(rule)).err());
        println!("without {rule:?}: {found:?}");
        assert!(found.is_some(), "nothing breaks without {rule:?}");
    }
}
