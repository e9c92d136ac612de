// The rule by which a merge is chosen, the same as `selection.recommend`; and how surely limits are met.
// `page` is the data block; `settings` are {weights: [], limits: []} by score: a weight of each objective and a
// limit of any score, null for none. A limit is the least an objective may score (the most, where lower is
// better), or by how much a guard may be worse than its reference.

const ROUNDING = 1e-9;

function margin(score, limit, reference) {
  return score.kind === "guard" ? limit : score.sign * (reference - limit);
}

// By how much a candidate exceeds a limit, in the limit's unit: 0 where it is met.
function excess(page, settings, candidate, of, j) {
  const score = page.scores[j], limit = settings.limits[j];
  if (limit === null) return 0;
  const base = page.candidates[score.reference];
  const room = margin(score, limit, base.chosen_by[j]);
  const own = score.sign * candidate[of][j], reference = score.sign * base[of][j];
  const floor = score.kind === "guard" ? reference - room : score.sign * limit;
  const over = floor - own;
  const size = Math.max(Math.abs(reference), Math.abs(own)) + room;
  if (over <= 0 || Math.abs(over) <= ROUNDING * size) return 0;
  return over / (Math.max(room, score.stderr) || 1);
}

function worstExcess(page, settings, candidate, of) {
  return Math.max(0, ...page.scores.map((_, j) => excess(page, settings, candidate, of, j)));
}

// The share of the resamples in which a value is at least `bound`, from its quantiles at `levels`.
function shareAbove(levels, quantiles, bound) {
  const last = quantiles.length - 1, tiny = ROUNDING * (Math.abs(bound) + 1);
  if (quantiles[0] >= bound - tiny) return 1;
  if (quantiles[last] < bound - tiny) return 0;
  const k = quantiles.findIndex(quantile => quantile >= bound - tiny);
  const part = (bound - quantiles[k - 1]) / (quantiles[k] - quantiles[k - 1]);
  return 1 - levels[k - 1] - Math.min(part, 1) * (levels[k] - levels[k - 1]);
}

// How probably a candidate meets every limit; scores have items of their own, so that their shares multiply.
function probability(page, settings, candidate) {
  return page.scores.reduce((product, score, j) => {
    const limit = settings.limits[j];
    if (limit === null) return product;
    const bound = score.kind === "guard" ? -limit : score.sign * limit;
    return product * shareAbove(page.levels, candidate.quantiles[j], bound);
  }, 1);
}

// Every candidate with what the rule sees of it, the best first; the base and the experts are no merges.
function ranked(page, settings) {
  const objectives = page.scores.map((score, j) => j).filter(j => page.scores[j].kind === "objective");
  const rows = page.candidates.map((candidate, index) => {
    const losses = objectives.map(j => settings.weights[j] * candidate.losses[j]);
    return {
      index,
      candidate,
      excess: worstExcess(page, settings, candidate, "chosen_by"),
      worst: Math.max(...losses),
      sum: losses.reduce((total, loss) => total + loss, 0),
      meetsAsMeasured: worstExcess(page, settings, candidate, "measured") === 0,
      probability: probability(page, settings, candidate),
    };
  });
  const better = (a, b) => a.candidate.signed.every((value, i) => value >= b.candidate.signed[i])
    && a.candidate.signed.some((value, i) => value > b.candidate.signed[i]);
  const kept = rows.filter(row => row.meetsAsMeasured);
  for (const row of rows) row.onFront = row.meetsAsMeasured && !kept.some(other => better(other, row));
  return rows.sort((a, b) => a.excess - b.excess || a.worst - b.worst || a.sum - b.sum || a.index - b.index);
}

function recommended(rows) {
  return rows.find(row => row.candidate.is_merge) ?? null;
}
