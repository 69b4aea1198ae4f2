//! How PEFT matches the names of modules.

use regex::{Regex, RegexBuilder};

use crate::{Error, Result};

/// `rank_pattern` or `alpha_pattern`: a value per module name, by regular expression; the first match counts.
#[derive(Debug, Clone)]
pub struct Patterns<T> {
    entries: Vec<(String, Regex, T)>,
}

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Self { entries: Vec::new() }
    }
}

impl<T: PartialEq> PartialEq for Patterns<T> {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl<T> Patterns<T> {
    /// Compiles the patterns, in order of precedence. PEFT writes its dictionaries sorted, so on disk that is the order of
    /// the keys.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an expression that Rust's `regex` does not know, or reads otherwise than Python.
    pub fn new(entries: impl IntoIterator<Item = (String, T)>) -> Result<Self> {
        let compile = |(key, value): (String, T)| {
            let regex = compile(&format!("^(?:.*\\.)?(?:{key})$"), &key)?;
            Ok((key, regex, value))
        };
        Ok(Self { entries: entries.into_iter().map(compile).collect::<Result<_>>()? })
    }

    /// The value for a module: of the first pattern that matches the end of its name from a dot on, or equals it.
    pub fn get(&self, module: &str) -> Option<&T> {
        let matching = self.entries.iter().find(|(_, regex, _)| regex.is_match(module));
        matching.or_else(|| self.entries.iter().find(|(key, ..)| key == module)).map(|(.., value)| value)
    }

    /// The patterns and their values, in order of precedence.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &T)> {
        self.entries.iter().map(|(key, _, value)| (key.as_str(), value))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// `target_modules` or `exclude_modules`.
#[derive(Debug, Clone)]
pub(super) enum Targets {
    /// Whole names, or their ends from a dot on.
    Names(Vec<String>),
    /// An expression for the whole name.
    Expression(Regex),
}

impl Targets {
    pub(super) fn expression(pattern: &str) -> Result<Self> {
        compile(&format!("^(?:{pattern})$"), pattern).map(Targets::Expression)
    }

    pub(super) fn matches(&self, module: &str) -> bool {
        match self {
            Targets::Names(names) => names.iter().any(|name| ends_with_name(module, name)),
            Targets::Expression(regex) => regex.is_match(module),
        }
    }
}

/// Whether `module` is `name`, or ends with it from a dot on.
pub(super) fn ends_with_name(module: &str, name: &str) -> bool {
    module.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Compiles an expression that was written for Python. `key` names it in errors.
pub(super) fn compile(pattern: &str, key: &str) -> Result<Regex> {
    // These mean something else to Python's `re`: set operations, POSIX classes, word edges.
    const OTHERWISE: [&str; 6] = ["&&", "--", "~~", "[[", "\\<", "\\>"];
    let unsupported = |what: String| Error::unsupported(format!("the pattern {key:?}"), what);
    if let Some(odd) = OTHERWISE.iter().find(|odd| key.contains(**odd)) {
        return Err(unsupported(format!("{odd} in a regular expression")));
    }
    RegexBuilder::new(pattern)
        .size_limit(1 << 20)
        .nest_limit(50)
        .build()
        .map_err(|e| unsupported(format!("this regular expression ({})", first_line(&e.to_string()))))
}

/// The last line of a `regex` error is its reason; the others draw the pattern.
fn first_line(message: &str) -> String {
    message.lines().last().unwrap_or_default().trim().to_owned()
}
