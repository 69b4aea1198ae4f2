use crate::Result;
use crate::nf4::check_len;

/// The rows of a mixture of experts by expert, as [`cuda::expert_groups`](crate::cuda::expert_groups) lays them out: `groups` is
/// `start` `[count + 1]`, `expert` `[count]` and `row` `[rows]`, where `count` is the smaller one of the rows and `experts + 2`.
///
/// Group i has the rows from `row[start[i]]` to before `row[start[i + 1]]`, in ascending order. Groups are in the order of their
/// experts; those of rows without one (-1), and of rows with a wrong number (-2), come last. Groups that are not used are empty, of expert
/// -1. Without rows nothing is written.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when `groups` has not `2 * count + 1 + rows` elements. It is not written then.
pub fn expert_groups(expert: &[i32], experts: usize, groups: &mut [i32]) -> Result<()> {
    let rows = expert.len();
    let count = rows.min(experts.saturating_add(2));
    check_len("groups", 2 * count + 1 + rows, "elements", groups.len())?;
    if rows == 0 {
        return Ok(());
    }
    let (start, rest) = groups.split_at_mut(count + 1);
    let (group_expert, row) = rest.split_at_mut(count);
    start.fill(rows as i32);
    group_expert.fill(-1);
    let key = |&i: &usize| match expert[i] {
        -1 => experts,
        e => usize::try_from(e).ok().filter(|&e| e < experts).unwrap_or(experts + 1),
    };
    let mut order: Vec<usize> = (0..rows).collect();
    order.sort_by_key(key);
    for (group, members) in order.chunk_by(|a, b| key(a) == key(b)).enumerate() {
        let first = order.partition_point(|i| key(i) < key(&members[0]));
        start[group] = first as i32;
        group_expert[group] = match key(&members[0]) {
            key if key < experts => key as i32,
            key => experts as i32 - 1 - key as i32,
        };
    }
    for (row, i) in row.iter_mut().zip(order) {
        *row = i as i32;
    }
    Ok(())
}
