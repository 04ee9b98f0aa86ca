//! `walfleet version`

use crate::failure::Failure;
use crate::session::Session;
use crate::view::version::Version;

pub fn run(session: &mut Session<'_>) -> Result<(), Failure> {
    session.show(&Version { version: env!("CARGO_PKG_VERSION") })
}
