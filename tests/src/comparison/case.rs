//! One thing that people do, as a script.

/// Cases about one subject.
#[derive(Debug)]
pub struct Chapter {
    /// Heading in the documentation.
    pub title: &'static str,
    /// Its cases, by what they share: starting a container takes far longer than most of them.
    pub groups: &'static [Group],
}

impl Chapter {
    /// All its cases.
    pub fn cases(&self) -> impl Iterator<Item = &Case> {
        self.groups.iter().flat_map(|group| group.cases)
    }
}

/// Cases that share a container, or a few.
#[derive(Debug)]
pub struct Group {
    /// What it is about; part of the containers' names.
    pub name: &'static str,
    /// Where the cases run.
    pub place: Place,
    /// Run on the host before, as a script of bash.
    pub before: &'static str,
    /// What is done, one after the other.
    pub cases: &'static [Case],
    /// Run on the host afterwards.
    pub after: &'static str,
}

/// Where cases run.
#[derive(Debug, Clone, Copy)]
pub enum Place {
    /// In a container, as scripts of busybox's sh; `docker run` has these options, as a shell reads them.
    Container(&'static str),
    /// On the host, as scripts of bash that call the engine.
    Host,
}

/// One thing that people do, in a shell of its own. On the host a script finds `$runtime`, a `$name` of its
/// group's own for whatever it makes, a `$port` and the functions of `prelude.sh`.
#[derive(Debug)]
pub struct Case {
    /// The fact that the case shows, unique in its chapter.
    pub name: &'static str,
    /// What is done.
    pub script: &'static str,
    /// What is to be different.
    pub differs: Option<Difference>,
}

/// A difference on purpose.
#[derive(Debug, Clone, Copy)]
pub struct Difference {
    /// What Coracle's standard output or error must contain, where runc's does not.
    pub coracle: &'static str,
    /// What is different for users, and why, in Markdown.
    pub why: &'static str,
}

/// A case with the same outcome.
pub const fn same(name: &'static str, script: &'static str) -> Case {
    Case { name, script, differs: None }
}

/// A case where Coracle's outcome contains `coracle`, and runc's does not.
pub const fn differs(
    name: &'static str,
    script: &'static str,
    coracle: &'static str,
    why: &'static str,
) -> Case {
    Case { name, script, differs: Some(Difference { coracle, why }) }
}
