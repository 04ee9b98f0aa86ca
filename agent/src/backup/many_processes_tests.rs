//! What a backup and a restore take of memory with one process and with many, in the made-up data directory.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::{back_up, files, ground, make_cluster, noise, peak_mib, restore};

/// A relation of a gigabyte in segments of 40 MiB, whose pages count as replayed whatever is in them.
fn make_large(data_dir: &Path) -> Vec<PathBuf> {
    make_cluster(data_dir, 1);
    let paths: Vec<_> = (1..=26).map(|segment| data_dir.join(format!("base/1/20000.{segment}"))).collect();
    for (seed, path) in (1..).zip(&paths) {
        let mut pages = noise(seed, 40 << 20);
        for page in pages.chunks_exact_mut(8192) {
            page[..8].copy_from_slice(&[0x80, 1, 0, 0, 0, 0, 0, 0]);
            page[5000..].fill(seed as u8);
        }
        fs::write(path, pages).unwrap();
    }
    paths
}

/// Every `step`th page is another.
fn overwrite(paths: &[PathBuf], step: usize, seed: u64) {
    for path in paths {
        let file = fs::File::options().write(true).open(path).unwrap();
        for page in (0..5120u64).step_by(step) {
            file.write_all_at(&noise(seed + page, 64), page * 8192 + 100).unwrap();
        }
    }
}

/// `TMPDIR=/dev/shm WALFLEET_PROCESSES=8,16 cargo test -p walfleet-agent --lib -- --ignored --nocapture number_of_processes`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes and three gigabytes, and measures the process that it runs in"]
async fn a_gigabyte_fits_into_256_mib_whatever_the_number_of_processes() {
    crate::memory::give_back_large_buffers();
    let numbers = std::env::var("WALFLEET_PROCESSES").unwrap_or_else(|_| "1,2,4,8,16,64,256".to_owned());
    let mut all = Vec::new();
    for processes in numbers.split(',') {
        let mut ground = ground().await;
        ground.processes = processes.parse().unwrap();
        let data_dir = ground.folder.path().join("data");
        let paths = make_large(&data_dir);
        peak_mib();
        let mut peaks = Vec::new();
        let mut note = |what: &'static str, begun: Instant| peaks.push((what, peak_mib(), begun.elapsed().as_millis()));
        let begun = Instant::now();
        back_up(&ground, &data_dir).await;
        note("backup", begun);
        overwrite(&paths, 8, 1 << 40);
        let begun = Instant::now();
        let (last, report) = back_up(&ground, &data_dir).await;
        assert!(report.has_overlays, "pages were compared");
        note("compared", begun);
        let begun = Instant::now();
        restore(&ground, &last, &ground.folder.path().join("restored")).await;
        note("restore", begun);
        println!("{processes} processes: peak resident memory in MiB, and ms: {peaks:?}");
        assert!(files(&ground.folder.path().join("restored/base")) == files(&data_dir.join("base")));
        peak_mib();
        all.extend(peaks);
    }
    assert!(all.iter().all(|(_, mib, _)| *mib < 256), "{all:?}");
}
