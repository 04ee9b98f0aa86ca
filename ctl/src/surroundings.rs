//! What a command sees of the world around it: environment, clock, zone, terminal and standard input.
//!
//! Commands take all of it from here and nothing from the process, so that a test decides what they see.

use std::collections::BTreeMap;
use std::io::{BufRead, IsTerminal};
use std::path::PathBuf;
use std::sync::Mutex;

use jiff::Timestamp;
use jiff::tz::TimeZone;

pub struct Surroundings {
    variables: BTreeMap<String, String>,
    /// `None`: the system's clock.
    pub fixed_now: Option<Timestamp>,
    /// The zone in which a person at this machine thinks.
    pub zone: TimeZone,
    pub stdout_is_terminal: bool,
    pub stderr_is_terminal: bool,
    pub stdin_is_terminal: bool,
    /// Columns for help texts; `None`: as wide as the terminal, at most 100.
    pub width: Option<usize>,
    input: Mutex<Box<dyn BufRead + Send>>,
}

impl Surroundings {
    pub fn of_process() -> Surroundings {
        Surroundings {
            variables: std::env::vars_os()
                .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
                .collect(),
            fixed_now: None,
            zone: TimeZone::system(),
            stdout_is_terminal: std::io::stdout().is_terminal(),
            stderr_is_terminal: std::io::stderr().is_terminal(),
            stdin_is_terminal: std::io::stdin().is_terminal(),
            width: None,
            input: Mutex::new(Box::new(std::io::BufReader::new(std::io::stdin()))),
        }
    }

    /// No variables, no terminal, the given clock, UTC, 100 columns.
    pub fn bare(now: Timestamp, input: impl BufRead + Send + 'static) -> Surroundings {
        Surroundings {
            variables: BTreeMap::new(),
            fixed_now: Some(now),
            zone: TimeZone::UTC,
            stdout_is_terminal: false,
            stderr_is_terminal: false,
            stdin_is_terminal: false,
            width: Some(100),
            input: Mutex::new(Box::new(input)),
        }
    }

    pub fn with_variable(mut self, name: &str, value: impl Into<String>) -> Surroundings {
        self.variables.insert(name.to_owned(), value.into());
        self
    }

    /// An empty variable counts as not set, as the XDG and NO_COLOR conventions have it.
    pub fn variable(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    pub fn now(&self) -> Timestamp {
        self.fixed_now.unwrap_or_else(Timestamp::now)
    }

    pub fn user(&self) -> Option<&str> {
        self.variable("USER").or_else(|| self.variable("LOGNAME"))
    }

    /// `$XDG_CONFIG_HOME/walfleet`, by default `~/.config/walfleet`; `None` where there is no home.
    pub fn configuration_folder(&self) -> Option<PathBuf> {
        self.variable("XDG_CONFIG_HOME")
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
            .or_else(|| self.variable("HOME").map(|home| PathBuf::from(home).join(".config")))
            .map(|path| path.join("walfleet"))
    }

    pub fn colour_on_stdout(&self) -> bool {
        self.stdout_is_terminal && self.colour_wanted()
    }

    pub fn colour_on_stderr(&self) -> bool {
        self.stderr_is_terminal && self.colour_wanted()
    }

    fn colour_wanted(&self) -> bool {
        self.variable("NO_COLOR").is_none() && self.variable("TERM") != Some("dumb")
    }

    /// One line that a person typed; `None` at the end of input.
    pub fn read_line(&self) -> std::io::Result<Option<String>> {
        let mut input = self.input.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut line = String::new();
        Ok(if input.read_line(&mut line)? == 0 { None } else { Some(line.trim().to_owned()) })
    }

    pub fn read_all(&self) -> std::io::Result<String> {
        let mut input = self.input.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut text = String::new();
        input.read_to_string(&mut text)?;
        Ok(text)
    }
}
