//! Our programs, run as on real hosts: a controller, agents beside their servers, and the operator's command.

pub mod agent;
pub mod controller;
pub mod ctl;

pub use agent::{Agent, AgentBuilder};
pub use controller::Controller;
pub use ctl::Ctl;
