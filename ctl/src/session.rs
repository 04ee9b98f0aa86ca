//! One run of one command: where it reads, where it writes, whom it talks to.

use std::io::{ErrorKind, Write};
use std::path::Path;

use jiff::Timestamp;

use crate::client::Client;
use crate::context;
use crate::failure::Failure;
use crate::print::{Format, View, render};
use crate::surroundings::Surroundings;
use crate::{ink, renewal};

pub struct Session<'a> {
    pub surroundings: &'a Surroundings,
    pub format: Format,
    context_choice: Option<String>,
    stdout: &'a mut (dyn Write + Send),
    stderr: &'a mut (dyn Write + Send),
    /// The reader of stdout went away (`walfleet … | head`): nothing more is written, and that is no failure.
    stdout_is_closed: bool,
}

impl<'a> Session<'a> {
    pub fn new(
        surroundings: &'a Surroundings,
        format: Format,
        context_choice: Option<String>,
        stdout: &'a mut (dyn Write + Send),
        stderr: &'a mut (dyn Write + Send),
    ) -> Session<'a> {
        Session { surroundings, format, context_choice, stdout, stderr, stdout_is_closed: false }
    }

    pub fn now(&self) -> Timestamp {
        self.surroundings.now()
    }

    /// The controller of the context that is in force.
    pub async fn client(&mut self) -> Result<Client, Failure> {
        let mut resolved = context::resolve(self.context_choice.as_deref(), self.surroundings)?;
        let client = Client::connect(&resolved.context).await?;
        let renewed = renewal::renew_if_due(client, &mut resolved, self.now()).await?;
        if let Some(warning) = renewed.warning {
            self.note(&warning);
        }
        Ok(renewed.client)
    }

    /// Data, to stdout, in the format that was asked for.
    pub fn show<V: View>(&mut self, view: &V) -> Result<(), Failure> {
        let text = render(view, self.format, self.now(), self.surroundings.colour_on_stdout())?;
        self.write(text.as_bytes())
    }

    /// What is not a view: completions.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        if self.stdout_is_closed {
            return Ok(());
        }
        match self.stdout.write_all(bytes).and_then(|()| self.stdout.flush()) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.stdout_is_closed = true;
                Ok(())
            }
            other => other.map_err(Failure::Output),
        }
    }

    /// A remark, to stderr. That nobody reads it changes nothing.
    pub fn note(&mut self, text: &str) {
        let _ = writeln!(self.stderr, "{}", ink::finish(text, self.surroundings.colour_on_stderr()));
    }

    /// A page that went through the printer already.
    pub fn note_rendered(&mut self, text: &str) {
        let _ = write!(self.stderr, "{text}");
    }

    /// Whether a person reads the page: only then remarks on what to type next are worth a line.
    pub fn is_for_people(&self) -> bool {
        matches!(self.format, Format::Table | Format::Wide)
    }

    /// A file that the operator named; `-` is stdin.
    pub fn read_input(&self, path: &Path) -> Result<String, Failure> {
        let text = if path == Path::new("-") { self.surroundings.read_all() } else { std::fs::read_to_string(path) };
        text.map_err(|source| Failure::Input { path: path.to_owned(), source })
    }

    /// Asks for `answer` to be typed, unless `--yes` was given. Where nobody can be asked, it is refused.
    pub fn confirm(&mut self, what: &str, answer: &str, yes: bool) -> Result<(), Failure> {
        if yes {
            return Ok(());
        }
        let refuse = |why| Err(Failure::NotConfirmed { what: what.to_owned(), why });
        if !self.surroundings.stdin_is_terminal {
            return refuse("since nobody can be asked here\nHINT: repeat it with --yes.");
        }
        let _ = write!(self.stderr, "{}", ink::finish(&format!("{what}? Type \"{answer}\" to go on: "), false));
        let _ = self.stderr.flush();
        match self.surroundings.read_line() {
            Ok(Some(typed)) if typed == answer => Ok(()),
            Ok(_) | Err(_) => refuse("since it was not confirmed"),
        }
    }
}
