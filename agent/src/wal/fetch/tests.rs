use walfleet_repository::crypto::DomainKey;
use walfleet_repository::format::wal_segment::SegmentFacts;
use walfleet_repository::layout::TailName;
use walfleet_repository::wal_archive::OwnedTail;

use super::*;

fn source(timelines: &str) -> RestoreSource {
    let text = format!(
        r#"{{"version": 1, "url": "file:///r", "options": {{}}, "key_file": "/k", "cluster": "orders",
            "system_identifier": 7, "segment_bytes": 1048576, "domain": "{}", "key_commitments": {{}},
            "timelines": [{timelines}], "read_ahead": 4, "needed_to_lsn": "0/900000", "ends_there": false}}"#,
        "0".repeat(32)
    );
    serde_json::from_str(&text).unwrap()
}

fn entry(timeline: u32, branch: u8, begins: &str, needed: (&str, &str)) -> String {
    let (branch, (from, to)) = (format!("{branch:02x}").repeat(8), needed);
    format!(
        r#"{{"timeline": {timeline}, "branch": "{branch}", {begins} "needed_from_lsn": "{from}", "needed_to_lsn": "{to}"}}"#
    )
}

#[test]
fn a_segment_is_read_from_the_branch_that_begins_last_before_it() {
    let legs = [
        entry(1, 0, "", ("0/200000", "0/500000")),
        entry(1, 8, r#""begins_lsn": "0/500000","#, ("0/500000", "0/700000")),
        entry(2, 9, "", ("0/700000", "0/900000")),
    ];
    let plan = Plan::of(&source(&legs.join(","))).unwrap();
    let segment = |timeline, number| Segment { timeline: Timeline(timeline), number };
    let from = |timeline, number| plan.wal(segment(timeline, number)).map(|wal| wal.branch.0[0]);
    assert_eq!([1, 2, 4, 5, 6, 7, 20].map(|number| from(1, number)), [0, 0, 0, 8, 8, 8, 8].map(Some));
    assert_eq!((from(2, 3), from(2, 7), from(3, 7)), (Some(9), Some(9), None));
    assert_eq!([1, 2, 4, 5, 6, 7].map(|number| plan.needs(segment(1, number))), [false, true, true, true, true, false]);
    assert_eq!(plan.history(Timeline(1)).map(|wal| wal.branch), Some(Branch::ROOT));
}

#[test]
fn a_file_of_an_earlier_version_reads_and_one_without_diverged_branches_is_as_it_was() {
    let old = source(&entry(1, 0, "", ("0/200000", "0/500000")));
    assert_eq!(old.timelines[0].begins_lsn, None);
    assert!(!serde_json::to_string(&old).unwrap().contains("begins_lsn"));
}

/// A segment that was whole, or longer, when the restore was planned.
#[tokio::test]
async fn a_beginning_is_not_delivered_for_more_than_it_is() {
    let keys = Arc::new(Keyring::of(DomainKey::generate().unwrap()));
    let archive = WalArchive::new(Store::in_memory(), "orders".parse().unwrap(), keys, 3);
    let begun = |number, to: u32| {
        let (archive, bytes) = (archive.clone(), vec![7; to as usize]);
        async move {
            let mut hasher = archive.content_hasher();
            let before = hasher.id();
            hasher.update(&bytes);
            let segment = Segment { timeline: Timeline(1), number };
            let tail = OwnedTail {
                wal: WalBranch { system_id: SystemId(7), timeline: Timeline(1), branch: Branch::ROOT },
                segment,
                segment_size: SegmentSize::new(1 << 20).unwrap(),
                name: TailName { from: 0, to, member: "pg1".into() },
                before,
                after: hasher.id(),
                bytes: bytes.into(),
                facts: SegmentFacts { valid_bytes: to, ..SegmentFacts::default() },
                shipped_at_us: 0,
                complete_at_us: None,
            };
            archive.put_tail(tail).await.unwrap();
            segment
        }
    };
    let plan =
        Plan::of(&RestoreSource { needed_to_lsn: Lsn(0x500100), ..source(&entry(1, 0, "", ("0/200000", "0/600000"))) })
            .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let destination = folder.path().join("RECOVERYXLOG");
    let middle = begun(4, 0x80000).await;
    let gone = bring_segment(&plan, &archive, middle, &destination).await;
    assert!(matches!(gone, Err(FetchError::Gone { .. })) && !destination.exists(), "{gone:?}");
    let last = begun(5, 0xff).await;
    assert!(bring_segment(&plan, &archive, last, &destination).await.is_err());
    begun(5, 0x100).await;
    assert_eq!(bring_segment(&plan, &archive, last, &destination).await.unwrap(), FetchOutcome::Delivered);
}
