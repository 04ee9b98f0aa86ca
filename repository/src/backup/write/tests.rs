//! Many threads fill few packs, and wait where the store is behind.

use std::collections::HashSet;
use std::time::Duration;

use super::*;
use crate::store::RetryPolicy;
use crate::store::faulty::{Fault, FaultyStore, On};

fn session(store: Store) -> Arc<PackSession> {
    let key = Arc::new(DomainKey::generate().unwrap());
    PackSession::begin(store, "orders".parse().unwrap(), BackupId::generate(), key, 3, [])
}

/// Does not compress; different for every number.
fn noise(number: u64, len: usize) -> Vec<u8> {
    let blocks =
        (0..len.div_ceil(32) as u64).map(|block| *blake3::hash(&(number << 32 | block).to_le_bytes()).as_bytes());
    blocks.flatten().take(len).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn however_many_threads_write_few_packs_are_open_and_the_last_to_flush_finishes_them() {
    let session = session(Store::in_memory());
    let writing = session.clone();
    let placed = tokio::task::spawn_blocking(move || {
        let mut writers = writing.writers(16);
        let mut store = |number: u64| {
            let content = noise(number, 9000);
            (writers[number as usize % 16].store(&content, None).unwrap(), content)
        };
        let placed: Vec<_> = (0..48).map(&mut store).collect();
        let open: HashSet<_> = placed.iter().map(|(chunk, _)| chunk.pack).collect();
        assert_eq!(open.len(), OPEN_PACKS);
        // The first to meet the question answers for those who share its pack, and nobody answers twice.
        writing.ask_for_names();
        (0..16).for_each(|number| drop(store(100 + number)));
        assert!(placed.iter().all(|(chunk, _)| writing.resolve(chunk).is_some()));
        assert_eq!(writing.finished_packs(), OPEN_PACKS as u64);
        for (flushed, writer) in writers.iter_mut().enumerate() {
            assert_eq!(writing.finished_packs(), (OPEN_PACKS + flushed.saturating_sub(14)) as u64);
            writer.flush().unwrap();
        }
        placed
    })
    .await
    .unwrap();
    session.count_use(placed.iter().map(|(chunk, _)| chunk));
    assert_eq!(session.finish().await.unwrap().len(), OPEN_PACKS);
    assert_eq!(session.finished_packs(), 2 * OPEN_PACKS as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_the_store_is_behind_all_threads_wait_and_nothing_is_lost() {
    const TARGET: usize = 1 << 20;
    let faulty = FaultyStore::in_memory(1);
    faulty.inject_randomly(Fault::Slow(Duration::from_millis(800)), On::Put, "packs", 1.0);
    let session = session(Store::wrap(faulty.clone(), "memory:///", RetryPolicy::default()));
    let begun = std::time::Instant::now();
    let open: [Arc<Mutex<OpenPack>>; OPEN_PACKS] = Default::default();
    let threads: Vec<_> = (0..8usize)
        .map(|thread| {
            let mut writer = session.writer_into(open[thread % OPEN_PACKS].clone(), TARGET, Kind::Content);
            tokio::task::spawn_blocking(move || {
                let chunks = (0..8).map(|chunk| noise((thread * 8 + chunk) as u64, 128 << 10));
                let placed: Vec<_> = chunks.map(|chunk| writer.store(&chunk, None).unwrap()).collect();
                writer.flush().unwrap();
                placed
            })
        })
        .collect();
    while begun.elapsed() < Duration::from_millis(700) {
        assert!(session.finished_packs() <= FULL_PACKS as u64, "full packs gather in memory");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(session.finished_packs(), FULL_PACKS as u64);
    faulty.heal();
    let mut placed = Vec::new();
    for thread in threads {
        placed.extend(thread.await.unwrap());
    }
    assert!(placed.len() == 64 && placed.iter().all(|chunk| session.resolve(chunk).is_some()));
    session.count_use(&placed);
    let stored: u64 = session.finish().await.unwrap().iter().map(|pack| pack.stored_bytes).sum();
    assert!(stored > 8 << 20, "{stored}");
}
