//! What is in force of what a policy says of a cluster: what keeps more at once, what keeps less only after it has stood for a
//! day, or when an operator says so. A slip in a document, a label that binds another policy: either is seen before it costs
//! anything.

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use walfleet_repository::ids::ClusterName;

use crate::resources::RetentionSpec;

/// By repository and cluster.
pub(super) const PREFIX: &str = "retention/standing/";

pub(super) fn key(repository: &str, cluster: &ClusterName) -> String {
    format!("{PREFIX}{repository}/{cluster}")
}

#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Standing {
    /// `None`: everything is kept.
    pub in_force: Option<RetentionSpec>,
    /// What the policy says, where that is less.
    pub asked: Option<Asked>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Asked {
    pub spec: RetentionSpec,
    pub since: Timestamp,
}

impl Standing {
    /// Once the policy says this. `notice`: how long what keeps less must have stood.
    pub fn after(&self, wanted: &RetentionSpec, notice: SignedDuration, now: Timestamp) -> Standing {
        if self.in_force.as_ref().is_some_and(|in_force| wanted.covers(in_force)) {
            return Standing::of(wanted);
        }
        // A clock that was set back begins it anew.
        let same = self.asked.as_ref().filter(|asked| asked.spec == *wanted && asked.since <= now);
        let asked = same.cloned().unwrap_or(Asked { spec: wanted.clone(), since: now });
        if asked.since + notice <= now {
            return Standing::of(wanted);
        }
        Standing { in_force: self.in_force.as_ref().map(|in_force| in_force.and(wanted)), asked: Some(asked) }
    }

    pub fn of(spec: &RetentionSpec) -> Standing {
        Standing { in_force: Some(spec.clone()), asked: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::Span;

    const DAY: SignedDuration = SignedDuration::from_hours(24);

    fn spec(days: u64, daily: u32) -> RetentionSpec {
        RetentionSpec {
            window: Span::hours(days * 24),
            daily,
            weekly: 0,
            monthly: 0,
            yearly: 0,
            time_zone: Some("UTC".to_owned()),
            minimum: 1,
            trash: Span::hours(24),
        }
    }

    #[test]
    fn more_counts_at_once_and_less_after_a_day() {
        let at = |hours: i64| Timestamp::UNIX_EPOCH + SignedDuration::from_hours(hours);
        let first = Standing::default().after(&spec(7, 0), DAY, at(0));
        assert_eq!(first.in_force, None, "before, everything was kept");
        assert_eq!(first.after(&spec(7, 0), DAY, at(23)), first);
        let stood = first.after(&spec(7, 0), DAY, at(24));
        assert_eq!(stood, Standing::of(&spec(7, 0)));
        assert_eq!(stood.after(&spec(8, 3), DAY, at(25)), Standing::of(&spec(8, 3)));
        let mixed = stood.after(&spec(3, 5), DAY, at(25));
        assert_eq!(mixed.in_force, Some(spec(7, 5)), "what is more of it");
        assert_eq!(mixed.after(&spec(7, 5), DAY, at(26)), Standing::of(&spec(7, 5)), "it was taken back");
        let other = mixed.after(&spec(2, 5), DAY, at(48));
        assert_eq!(other.after(&spec(2, 5), DAY, at(50)).in_force, Some(spec(7, 5)), "another one begins its own day");
        assert_eq!(other.after(&spec(2, 5), DAY, at(47)).asked.map(|asked| asked.since), Some(at(47)));
        let elsewhere = RetentionSpec { time_zone: Some("Asia/Tokyo".to_owned()), ..spec(7, 5) };
        assert!(Standing::of(&spec(7, 5)).after(&elsewhere, DAY, at(0)).asked.is_some(), "other days, other copies");
        let without = RetentionSpec { time_zone: Some("Asia/Tokyo".to_owned()), ..spec(7, 0) };
        assert!(Standing::of(&spec(7, 0)).after(&without, DAY, at(0)).asked.is_none());
    }
}
