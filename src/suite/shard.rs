//! The part of a suite that this machine runs.

use crate::error::BadInput;

/// Part `index` of `count`, both from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    pub index: usize,
    pub count: usize,
}

impl Shard {
    /// The whole suite.
    pub const WHOLE: Shard = Shard { index: 1, count: 1 };

    /// `I/N`, as `--shard` takes it.
    pub fn parse(text: &str) -> Result<Self, BadInput> {
        let numbers = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match numbers {
            Some((index, count)) if (1..=count).contains(&index) => Ok(Self { index, count }),
            _ => Err(BadInput::new(format!("`--shard {text}`: I/N is needed, with I from 1 to N"))
                .hint("`--shard 1/4` is the first of four parts")),
        }
    }

    /// Shard by the environment of a Slurm array or a Kubernetes Indexed Job; `None` outside of both. Fails where the
    /// environment is incomplete, and where an array is a part of another: of tasks 3 and 7 nothing says how many there were at
    /// first.
    pub fn from_env(variable: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>, BadInput> {
        if variable("SLURM_ARRAY_TASK_ID").is_some() {
            let id = number("SLURM_ARRAY_TASK_ID", variable)?;
            let count = number("SLURM_ARRAY_TASK_COUNT", variable)?;
            let first = or("SLURM_ARRAY_TASK_MIN", variable, 1)?;
            let last = or("SLURM_ARRAY_TASK_MAX", variable, (first + count).saturating_sub(1))?;
            if first > 1 || last.checked_sub(first) != count.checked_sub(1) {
                let message = format!(
                    "`SLURM_ARRAY_TASK_COUNT` is {count} of the tasks {first} to {last}: this may be a part of an array"
                );
                let hint =
                    format!("say `--shard {id}/N`, where N is the number of parts of all; deploy/slurm-array.sh does");
                return Err(BadInput::new(message).hint(hint));
            }
            return Self::within("SLURM_ARRAY_TASK_ID", id.saturating_sub(first).saturating_add(1), count).map(Some);
        }
        if variable("JOB_COMPLETION_INDEX").is_some() {
            let index = number("JOB_COMPLETION_INDEX", variable)?;
            let count = number("JOB_COMPLETIONS", variable)?;
            return Self::within("JOB_COMPLETION_INDEX", index.saturating_add(1), count).map(Some);
        }
        Ok(None)
    }

    /// Cases go round, so that neighbours, which are alike, spread over the machines.
    pub fn has(self, case_index: usize) -> bool {
        (case_index - 1) % self.count == self.index - 1
    }

    fn within(name: &str, index: usize, count: usize) -> Result<Self, BadInput> {
        match (1..=count).contains(&index) {
            true => Ok(Self { index, count }),
            false => Err(BadInput::new(format!("`{name}` makes this part {index} of {count}")).hint(HINT)),
        }
    }
}

const HINT: &str = "say `--shard I/N`, or `--shard 1/1` for all";

fn number(name: &str, variable: &dyn Fn(&str) -> Option<String>) -> Result<usize, BadInput> {
    let text = variable(name)
        .ok_or_else(|| BadInput::new(format!("`{name}` is not set, so that nothing says how many parts")).hint(HINT))?;
    text.trim().parse().map_err(|_| BadInput::new(format!("`{name}` is `{text}`: a number is needed")).hint(HINT))
}

fn or(name: &str, variable: &dyn Fn(&str) -> Option<String>, default: usize) -> Result<usize, BadInput> {
    if variable(name).is_some() { number(name, variable) } else { Ok(default) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `Err` holds a word of the message.
    fn check(variables: &[(&str, &str)], expected: Result<Option<(usize, usize)>, &str>) {
        let get = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        match (Shard::from_env(&get), expected) {
            (Ok(shard), Ok(expected)) => {
                assert_eq!(shard.map(|shard| (shard.index, shard.count)), expected, "{variables:?}")
            }
            (Err(error), Err(word)) => assert!(error.to_string().contains(word), "{variables:?}: {error}"),
            (other, _) => panic!("{variables:?}: {other:?}"),
        }
    }

    #[test]
    fn schedulers_say_the_part() {
        let (id, count, min, max) =
            ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX");
        check(&[], Ok(None));
        check(&[(id, "1"), (count, "4")], Ok(Some((1, 4))));
        check(&[(id, "0"), (count, "4"), (min, "0")], Ok(Some((1, 4))));
        check(&[(id, "3"), (count, "4"), (min, "1"), (max, "4")], Ok(Some((3, 4))));
        // `--array=3`, `--array=1,5`, `--array=10-40:10`, `--array=0-6:2`: some of the tasks, or numbers that say nothing of parts.
        for (at, n, first, last) in
            [("3", "1", "3", "3"), ("5", "2", "1", "5"), ("30", "4", "10", "40"), ("2", "4", "0", "6")]
        {
            check(&[(id, at), (count, n), (min, first), (max, last)], Err("part of an array"));
        }
        check(&[(id, "1")], Err(count));
        check(&[(id, "x"), (count, "4")], Err("a number is needed"));
        check(&[(id, "9"), (count, "4")], Err("part 9 of 4"));
        check(&[("JOB_COMPLETION_INDEX", "0"), ("JOB_COMPLETIONS", "3")], Ok(Some((1, 3))));
        check(&[("JOB_COMPLETION_INDEX", "2"), ("JOB_COMPLETIONS", "3")], Ok(Some((3, 3))));
        check(&[("JOB_COMPLETION_INDEX", "3"), ("JOB_COMPLETIONS", "3")], Err("part 4 of 3"));
        check(&[("JOB_COMPLETION_INDEX", "0")], Err("JOB_COMPLETIONS"));
    }

    #[test]
    fn parts_are_disjoint_and_complete() {
        for count in 1..6 {
            for case in 1..14 {
                assert_eq!((1..=count).filter(|&index| Shard { index, count }.has(case)).count(), 1);
            }
        }
        for wrong in ["0/4", "5/4", "1", "a/b", "1/0", "-1/2", "1/2/3", ""] {
            assert!(Shard::parse(wrong).is_err(), "{wrong}");
        }
        assert_eq!(Shard::parse("2/4").unwrap(), Shard { index: 2, count: 4 });
    }
}
