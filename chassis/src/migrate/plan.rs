//! Decides which migrations to run. Without I/O.

use sqlx::migrate::Migration;

use crate::schema::{is_contracting, name};

/// What to do about the migrations of one migrator.
#[derive(Debug, PartialEq)]
pub(super) struct Plan<'m> {
    /// To run, in this order.
    pub(super) now: Vec<&'m Migration>,
    /// Whether contracting migrations are left for later.
    pub(super) left: bool,
    /// Migrations of the database that are not known.
    pub(super) ahead: usize,
}

/// A database whose migrations do not fit those of this version.
#[derive(Debug, PartialEq, thiserror::Error)]
pub(super) enum Unfit {
    #[error(
        "migration {0} of the database differs from the one this binary was built with: run the version that migrated it"
    )]
    Different(String),
    #[error(
        "the database has migration {unknown}, which this binary does not know, and lacks migration {lacking}, which it \
         does: run a version that knows both"
    )]
    Forked { unknown: i64, lacking: String },
}

/// `known` are the migrations of this version, and `applied` the versions that were run, with their checksums.
///
/// A database that is ahead was migrated by a newer version. That version also decides when to contract, because only
/// its operator knows which processes still run.
pub(super) fn plan<'m>(known: &'m [Migration], applied: &[(i64, Vec<u8>)], contract: bool) -> Result<Plan<'m>, Unfit> {
    let checksum_of = |version| applied.iter().find(|(run, _)| *run == version).map(|(_, checksum)| checksum);
    let mut lacking = Vec::new();
    for migration in known {
        match checksum_of(migration.version) {
            None => lacking.push(migration),
            Some(checksum) if **checksum != *migration.checksum => return Err(Unfit::Different(name(migration))),
            Some(_) => {}
        }
    }
    let unknown: Vec<i64> = applied.iter().map(|(version, _)| *version).filter(|run| !knows(known, *run)).collect();
    let contract = contract || applied.is_empty();
    let (mut now, later): (Vec<_>, Vec<_>) =
        lacking.into_iter().partition(|migration| contract || !is_contracting(migration));
    let Some(&first_unknown) = unknown.first() else {
        return Ok(Plan { now, left: !later.is_empty(), ahead: 0 });
    };
    now.retain(|migration| !is_contracting(migration));
    match now.first() {
        Some(lacking) => Err(Unfit::Forked { unknown: first_unknown, lacking: name(lacking) }),
        None => Ok(Plan { now, left: false, ahead: unknown.len() }),
    }
}

fn knows(known: &[Migration], version: i64) -> bool {
    known.iter().any(|migration| migration.version == version)
}

#[cfg(test)]
mod tests {
    use sqlx::{
        SqlSafeStr,
        migrate::{Migration, MigrationType},
    };

    use super::{Unfit, plan};

    fn known(names: &[(i64, &'static str)]) -> Vec<Migration> {
        let of = |&(version, name): &(i64, &'static str)| {
            Migration::new(version, name.into(), MigrationType::Simple, "SELECT".into_sql_str(), false)
        };
        names.iter().map(of).collect()
    }

    fn applied(versions: &[i64]) -> Vec<(i64, Vec<u8>)> {
        let checksum = known(&[(1, "any")])[0].checksum.to_vec();
        versions.iter().map(|version| (*version, checksum.clone())).collect()
    }

    const THREE: [(i64, &str); 3] = [(1, "tables"), (2, "columns"), (3, "contract columns")];

    /// The versions to run, whether some are left, and by how many the database is ahead.
    fn planned(versions: &[i64], contract: bool) -> Result<(Vec<i64>, bool, usize), Unfit> {
        let known = known(&THREE);
        let plan = plan(&known, &applied(versions), contract)?;
        Ok((plan.now.iter().map(|migration| migration.version).collect(), plan.left, plan.ahead))
    }

    #[test]
    fn what_the_database_lacks_is_run_and_contracting_migrations_only_if_asked_for_or_in_a_new_one() {
        assert_eq!(planned(&[], false), Ok((vec![1, 2, 3], false, 0)));
        assert_eq!(planned(&[1], false), Ok((vec![2], true, 0)));
        assert_eq!(planned(&[1], true), Ok((vec![2, 3], false, 0)));
        assert_eq!(planned(&[1, 2, 3], false), Ok((vec![], false, 0)));
        assert_eq!(planned(&[2], true), Ok((vec![1, 3], false, 0)));
    }

    #[test]
    fn a_database_that_is_ahead_and_lacks_nothing_is_left_alone() {
        assert_eq!(planned(&[1, 2, 3, 4, 5], false), Ok((vec![], false, 2)));
        assert_eq!(planned(&[1, 2, 4], false), Ok((vec![], false, 1)));
        assert_eq!(planned(&[1, 2, 4], true), Ok((vec![], false, 1)));
    }

    #[test]
    fn a_database_that_is_ahead_and_lacks_a_migration_is_a_fork() {
        assert_eq!(planned(&[1, 4], false), Err(Unfit::Forked { unknown: 4, lacking: "2 (columns)".into() }));
        assert_eq!(planned(&[1, 3, 4], true), Err(Unfit::Forked { unknown: 4, lacking: "2 (columns)".into() }));
    }

    #[test]
    fn a_migration_with_other_text_is_refused_though_the_database_is_ahead() {
        let mut applied = applied(&[1, 2, 4]);
        applied[1].1 = b"other".to_vec();
        assert_eq!(plan(&known(&THREE), &applied, false), Err(Unfit::Different("2 (columns)".into())));
    }
}
