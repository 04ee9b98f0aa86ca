//! The controller: initialised once, then a daemon.

pub struct Controller;
