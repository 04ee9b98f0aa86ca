//! Progress as one bar on the terminal's last line.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::ink;
use crate::quantity::size;
use crate::view::job::{Expected, Job};

pub struct Bars {
    bar: ProgressBar,
    colour: bool,
    measured: Option<bool>,
    told: Option<Expected>,
}

impl Bars {
    pub fn new(colour: bool) -> Bars {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
        bar.enable_steady_tick(Duration::from_millis(200));
        Bars { bar, colour, measured: None, told: None }
    }

    pub fn update(&mut self, job: &Job) {
        let progress = job.progress.as_ref().filter(|_| !job.state.is_over());
        let total = progress.and_then(|progress| progress.total_bytes);
        self.set_style(total.is_some());
        let mut message = match progress {
            Some(progress) => progress.phase.clone(),
            None => job.state.word().to_owned(),
        };
        if let Some(progress) = progress {
            if progress.expected.is_some() && progress.expected != self.told {
                self.told.clone_from(&progress.expected);
                self.note(&self.told.as_ref().map(Expected::shown).unwrap_or_default());
            }
            if let Some(total) = total {
                self.bar.set_length(total);
                self.bar.set_position(progress.done_bytes.min(total));
                message.push_str(&format!("  {} of {}", size(progress.done_bytes), size(total)));
            } else if progress.done_bytes > 0 {
                message.push_str(&format!("  {}", size(progress.done_bytes)));
            }
            let pace = progress.pace();
            if !pace.is_empty() {
                message.push_str(&format!("  {pace}"));
            }
        }
        if let Some(reason) = &job.reason {
            message.push_str(&format!("  {reason}"));
        }
        self.bar.set_prefix(ink::finish(&job.title(), false));
        self.bar.set_message(ink::finish(&message.replace('\n', " "), false));
    }

    fn set_style(&mut self, measured: bool) {
        if self.measured.replace(measured) == Some(measured) {
            return;
        }
        let bar = match (measured, self.colour) {
            (true, true) => "[{bar:30.cyan}] {percent:>3}% ",
            (true, false) => "[{bar:30}] {percent:>3}% ",
            (false, _) => "",
        };
        let template = format!("{{spinner}} {{prefix}}  {bar}{{msg}}  {{elapsed}}");
        let style = ProgressStyle::with_template(&template).expect("the template is a constant");
        self.bar.set_style(style.progress_chars("=> "));
    }

    pub fn note(&self, text: &str) {
        self.bar.println(ink::finish(text, false));
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
