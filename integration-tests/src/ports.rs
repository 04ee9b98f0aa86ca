//! Free TCP ports, each handed out once per process.

use std::collections::HashSet;
use std::net::TcpListener;
use std::sync::{LazyLock, Mutex};

/// Below the range from which Linux takes the ports of outgoing connections (32768 and up), so that none is taken
/// between being found free and being bound.
const RANGE: std::ops::Range<u16> = 20_000..32_000;

static HANDED_OUT: LazyLock<Mutex<HashSet<u16>>> = LazyLock::new(Default::default);

pub fn free_port() -> u16 {
    loop {
        let port = rand::random_range(RANGE);
        let free = TcpListener::bind(("127.0.0.1", port)).is_ok();
        if free && HANDED_OUT.lock().expect("no holder panics").insert(port) {
            return port;
        }
    }
}
