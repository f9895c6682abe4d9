// The console of an outbox: it reads and changes the outbox through the relay's API. The page's policy forbids markup
// from strings, so every text of the server becomes a text node.

const API = new URL('../api/', document.baseURI);
const POLL_MS = 3000;
const BACK_OFF_MS = 10_000;
const HISTORY_S = 600;
const RATE_WINDOW_S = 30;
const GAP_S = 30;
const PAGE = 100;
const MOST_NAMED = 1000;
const MOST_PER_SECOND = 1_000_000;
const MOST_LOOKED_UP = 10;
const COUNT_HOLDS_MS = 60_000;
const UUID = /^[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}$/i;
const TOKEN = /^[\w-]+$/;
const TOKEN_KEY = 'outbox-token';
const THEME_KEY = 'outbox-theme';

// A browser may refuse all use of its storage. The page then works, and remembers nothing.
function recall(storage, key) {
  try {
    return window[storage].getItem(key);
  } catch {
    return null;
  }
}

function remember(storage, key, value) {
  try {
    if (value) window[storage].setItem(key, value);
    else window[storage].removeItem(key);
  } catch {
    // Nothing is lost but what the next visit would find.
  }
}

function rememberedToken() {
  const token = recall('sessionStorage', TOKEN_KEY) ?? '';
  return TOKEN.test(token) ? token : '';
}

const state = {
  token: rememberedToken(),
  me: null,
  status: null,
  readings: [],
  history: [],
  failedSince: null,
  needsToken: false,
};

// ---- Elements and words

const $ = (id) => document.getElementById(id);

function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.flat(Infinity).filter((child) => (child ?? '') !== ''));
  return node;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const number = new Intl.NumberFormat('en');
const rate = new Intl.NumberFormat('en', { maximumFractionDigits: 1 });
const counted = (n, noun) => `${number.format(n)} ${noun}${n === 1 ? '' : 's'}`;
const two = (n) => String(n).padStart(2, '0');

function age(seconds) {
  if (seconds === null || seconds === undefined) return 'none';
  const s = Math.max(0, Math.floor(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86_400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86_400)} d ${Math.floor((s % 86_400) / 3600)} h`;
}

const clock = (date) => [date.getHours(), date.getMinutes(), date.getSeconds()].map(two).join(':');

function localTime(date) {
  const day = [date.getFullYear(), two(date.getMonth() + 1), two(date.getDate())].join('-');
  return date.toDateString() === new Date().toDateString() ? clock(date) : `${day} ${clock(date)}`;
}

function time(text) {
  return text ? h('time', { datetime: text, title: text }, localTime(new Date(text))) : 'unknown';
}

// The API's form of a UUID: lower case, with dashes.
const canonical = (id) => id.toLowerCase().replaceAll('-', '').replace(/^(.{8})(.{4})(.{4})(.{4})/, '$1-$2-$3-$4-');

// Ids are of UUID version 7. Those of one time share their beginning, so the end tells them apart.
const shortId = (id) => `…${id.slice(-8)}`;
const idText = (id) => h('code', { title: id }, shortId(id));
const journeyLink = (id, text = shortId(id)) => h('a', { href: `#journey/${encodeURIComponent(id)}`, title: id },
  h('code', {}, text));
const deedLink = (id) => h('a', { href: `#deeds?deed=${id}` }, `deed ${id}`);

function long(text) {
  if (text.length <= 120) return text && h('span', { class: 'long' }, text);
  return h('details', { class: 'long' }, h('summary', {}, `${text.slice(0, 100)}…`), h('p', {}, text));
}

const words = (name) => name.replace(/^(KIND|STATE|SEVERITY)_/, '').toLowerCase().replaceAll('_', ' ');

const ICONS = {
  OPEN: '●', DOWN: '▼', BARRED: '■', STARTING: '○', PAUSED: '‖', WAITING: '○', LEASED: '▶', 'BACKING OFF': '◆',
  DEAD: '■', DISCARDED: '×', APPLIED: '✓', OK: '✓', NOTE: '○', WARNING: '◆', FAULT: '■',
};

function badge(name) {
  const shown = words(name).toUpperCase();
  const icon = h('span', { 'aria-hidden': 'true' }, ICONS[shown] ?? '?');
  return h('span', { class: `badge is-${shown.toLowerCase().replaceAll(' ', '-')}` }, icon, ` ${shown}`);
}

function button(label, onclick, attributes = {}) {
  return h('button', { type: 'button', onclick, ...attributes }, label);
}

// On a phone, tables become cards. Roles keep them tables for a screen reader, and labels name their cells.
function row(tbody, cells, attributes = {}) {
  const heads = [...tbody.parentElement.tHead.rows[0].cells];
  const made = cells.map((content, i) => {
    const { className, textContent } = heads[i];
    return h('td', { role: 'cell', class: className, 'data-label': textContent }, content);
  });
  return h('tr', { role: 'row', ...attributes }, made);
}

// A click on a row does what its last control does, except on a control, and while text is selected.
function onRow(act) {
  return (event) => {
    if (!event.target.closest('a, button, input, details') && getSelection().isCollapsed) act();
  };
}

function giveRoles(table) {
  table.setAttribute('role', 'table');
  for (const part of table.querySelectorAll('thead, tbody')) part.setAttribute('role', 'rowgroup');
  for (const line of table.querySelectorAll('thead tr')) line.setAttribute('role', 'row');
  for (const head of table.querySelectorAll('th')) head.setAttribute('role', 'columnheader');
}

// Rows that are read again every few seconds are kept, so that focus and selection stay where they are.
function keyed(parent, items, keyOf, make, update) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  items.forEach((item, i) => {
    const key = keyOf(item);
    const node = old.get(key) ?? make(item);
    old.delete(key);
    node.dataset.key = key;
    update(node, item);
    if (parent.children[i] !== node) parent.insertBefore(node, parent.children[i] ?? null);
  });
  for (const node of old.values()) node.remove();
}

// Fills a cell only if what it shows has changed.
function fill(cell, shown, content) {
  const mark = JSON.stringify(shown);
  if (cell.dataset.shown === mark) return;
  cell.dataset.shown = mark;
  cell.replaceChildren(...[content()].flat(Infinity));
}

// ---- Calls

class CallError extends Error {
  constructor(status, answer) {
    super(answer.message || `The relay answered with status ${status}.`);
    this.status = status;
    this.reason = answer.reason ?? '';
    this.fields = answer.fields ?? [];
  }
}

async function fetchJson(path, options, token = state.token) {
  const headers = { ...options.headers };
  if (token) headers.Authorization = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(new URL(path, API), { ...options, headers, cache: 'no-store', credentials: 'omit' });
  } catch (cause) {
    if (options.signal?.reason?.name === 'AbortError') throw cause;
    throw new CallError(0, { message: 'The relay gave no answer.' });
  }
  const answer = await response.json().catch(() => null);
  if (!response.ok) throw new CallError(response.status, answer ?? {});
  if (typeof answer !== 'object' || answer === null) {
    throw new CallError(response.status, { message: 'The answer was broken off, or is not the relay’s.' });
  }
  return answer;
}

async function call(method, request = {}, signal = undefined) {
  const limit = AbortSignal.timeout(60_000);
  const { token } = state;
  try {
    return await fetchJson(method, {
      method: 'POST',
      headers: { 'Content-Type': 'application/json' },
      body: JSON.stringify(request),
      signal: signal ? AbortSignal.any([signal, limit]) : limit,
    });
  } catch (cause) {
    onRefusal(cause, token);
    throw cause;
  }
}

// A late refusal of an earlier token says nothing of the token that is in use now.
function onRefusal(cause, token) {
  if (cause.status === 401 && token === state.token) askForToken();
}

// Only a 4xx says that nothing was done. A proxy's 503 may hide an answer, and so may an answer that is broken off.
const isInDoubt = ({ status }) => !(status >= 400 && status < 500);

function explain(error) {
  const fields = (error.fields ?? []).map(({ field, description }) => `${field}: ${description}`);
  return [error.message, ...fields].join(' · ');
}

// An error describes its input, and a description is read out even while it is hidden. So the text goes, too.
function showError(node, text) {
  node.textContent = text;
  node.hidden = !text;
}

function markWrong(input, wrong) {
  input.setAttribute('aria-invalid', String(wrong));
}

// Runs what fills a view. A later run ends an earlier one, so that an old answer never covers a new one.
const runs = new Map();

async function load(view, work) {
  runs.get(view)?.abort();
  const run = new AbortController();
  runs.set(view, run);
  const section = $(`view-${view}`);
  const error = section.querySelector('.error');
  section.setAttribute('aria-busy', 'true');
  try {
    await work(run.signal);
    if (!run.signal.aborted) showError(error, '');
  } catch (cause) {
    if (run.signal.aborted) return;
    showError(error, explain(cause));
  } finally {
    if (runs.get(view) === run) section.removeAttribute('aria-busy');
  }
}

// ---- Who acts

function askForToken() {
  state.needsToken = true;
  state.me = null;
  state.token = '';
  remember('sessionStorage', TOKEN_KEY, '');
  showBanner();
  openTokenDialog();
}

function openTokenDialog() {
  if (!$('token-dialog').open) $('token-dialog').showModal();
}

async function useToken(event) {
  event.preventDefault();
  const token = $('token-input').value.trim();
  if (!TOKEN.test(token)) {
    showTokenError('A token has only letters, digits, “_” and “-”.');
    return;
  }
  const isStillAsked = () => $('token-dialog').open && $('token-input').value.trim() === token;
  try {
    const me = await askMe(token);
    if (!isStillAsked()) return;
    acceptToken(token);
    takeMe(me);
  } catch (cause) {
    if (isStillAsked()) showTokenError(cause.status === 401 ? 'The relay does not know this token.' : explain(cause));
    return;
  }
  $('token-dialog').close();
  poll();
  show();
}

function acceptToken(token) {
  state.token = token;
  remember('sessionStorage', TOKEN_KEY, $('token-keep').checked ? token : '');
}

function showTokenError(text) {
  showError($('token-error'), text);
  markWrong($('token-input'), Boolean(text));
}

function clearTokenDialog() {
  $('token-input').value = '';
  showTokenError('');
}

const askMe = (token) => fetchJson('me', { signal: AbortSignal.timeout(10_000) }, token);

function takeMe(me) {
  state.me = me;
  state.needsToken = false;
  showBanner();
  const { name, role } = me;
  document.documentElement.dataset.role = role;
  $('who').textContent = name ? `${name}, ${role}` : role;
  $('look-only').hidden = role === 'operator';
  $('other-token').hidden = !name;
  $('look-only-text').textContent = name
    ? `You may look, not act: ${name} has the role ${role}.`
    : 'You may look, not act: start the relay with --token-file, or use the command line.';
}

// ---- The status, again and again

let pollTimer = 0;
let polling = false;

async function poll() {
  clearTimeout(pollTimer);
  if (polling || document.hidden || state.needsToken) return;
  polling = true;
  const { token } = state;
  try {
    if (!state.me) await meet(token);
    take(await call('GetStatus'));
    state.failedSince = null;
  } catch (cause) {
    onRefusal(cause, token);
    if (cause.status !== 401) state.failedSince = { date: state.failedSince?.date ?? new Date(), cause };
  }
  polling = false;
  showBanner();
  const wait = state.failedSince ? BACK_OFF_MS : POLL_MS;
  pollTimer = setTimeout(poll, token === state.token ? wait : 0);
}

async function meet(token) {
  const me = await askMe(token);
  if (token !== state.token) return;
  takeMe(me);
  show();
}

function showBanner() {
  const text = bannerText();
  $('banner-token').hidden = !state.needsToken;
  $('banner').hidden = !text;
  setText($('banner-text'), text);
}

function bannerText() {
  const { failedSince, needsToken, status } = state;
  const read = status && clock(new Date(status.time));
  const old = read ? ` What this page shows is old: it was read until ${read}.` : '';
  if (needsToken) return `The relay asks for a token. Nothing is read until you enter one.${old}`;
  if (!failedSince) return '';
  const why = explain(failedSince.cause);
  if (failedSince.cause.reason === 'LOCAL_ONLY') return `The relay refuses this page: ${why}.${old}`;
  const last = read ? `last reading ${read}` : 'no reading yet';
  return `No answer since ${clock(failedSince.date)}, ${last}. ${why}`;
}

function take(status) {
  const now = Date.parse(status.time) / 1000;
  const last = state.history.at(-1);
  // A gap breaks the line in a chart: nothing is known of the time when nobody looked.
  if (last && now - last.now > GAP_S) state.history.push({ now: last.now + 1, ages: {} });
  const ages = Object.fromEntries(status.subscriptions.map((s) => [s.name, s.oldest_seconds ?? 0]));
  state.history.push({ now, in: status.in_per_second, out: status.out_per_second, ages });
  state.history = state.history.filter((point) => point.now > now - HISTORY_S);
  state.readings = [...state.readings.filter((old) => Date.parse(old.time) / 1000 >= now - RATE_WINDOW_S), status];
  state.status = status;
  showStatus();
}

// Relays report less often than the page reads. So the difference spans some readings.
function deliveredRates() {
  const rates = new Map();
  const [first] = state.readings;
  const seconds = (Date.parse(state.status.time) - Date.parse(first.time)) / 1000;
  const keyOf = (route) => JSON.stringify([route.relay_id, route.route]);
  const before = new Map(first.routes.map((route) => [keyOf(route), route.delivered]));
  for (const route of state.status.routes) {
    const earlier = before.get(keyOf(route));
    if (seconds <= 0 || !Number.isFinite(earlier) || !Number.isFinite(route.delivered)) continue;
    const more = Math.max(0, route.delivered - earlier) / seconds;
    rates.set(route.route, (rates.get(route.route) ?? 0) + more);
  }
  return rates;
}

// ---- Flow

const TILES = [
  ['Events in/s', 'in-rate', (s) => rate.format(s.in_per_second)],
  ['Events out/s', 'out-rate', (s) => rate.format(s.out_per_second)],
  ['Waiting', 'waiting', (s) => number.format(s.waiting)],
  ['Leased', 'leased', (s) => number.format(s.leased)],
  ['Backing off', 'backing-off', (s) => number.format(s.backing_off)],
  ['Dead', 'dead', (s) => number.format(s.dead), (s) => s.dead > 0],
  ['Unrouted', 'unrouted', (s) => number.format(s.unrouted), (s) => s.unrouted > 0],
  ['Held back', 'held-back', (s) => number.format(s.held_back)],
  ['Oldest age', 'oldest', (s) => age(s.oldest_seconds)],
];

function showStatus() {
  const { status } = state;
  $('nav-dead').hidden = !status.dead;
  setText($('nav-dead'), number.format(status.dead));
  setText($('reading'), `read at ${clock(new Date(status.time))}`);
  keyed($('tiles'), TILES, ([, test]) => test, makeTile, (tile, [, , text, alarm]) => {
    setText(tile.lastElementChild, text(status));
    tile.classList.toggle('alarm', Boolean(alarm?.(status)));
  });
  showPauseOfAll(status);
  showSubscriptions(status);
  showRoutes(status);
  showFailing(status);
  showDeadChanged();
  for (const [list, names] of [['subscription-names', status.subscriptions.map((s) => s.name)],
    ['type-names', status.types.map((t) => t.type)]]) {
    keyed($(list), names, (name) => name, (name) => h('option', { value: name }), () => {});
  }
  drawCharts();
}

function makeTile([label, test]) {
  return h('div', { class: 'tile' }, h('dt', {}, label), h('dd', { 'data-test': test }));
}

function byText(by, since, reason) {
  return [`by ${by || 'somebody'} since `, time(since), reason ? [': ', long(reason)] : ''];
}

const pauseText = (pause) => byText(pause.paused_by, pause.pause_time, pause.reason);
const paceText = (pace) => [
  `slowed to ${number.format(pace.events_per_second)}/s `, ...byText(pace.set_by, pace.set_time, pace.reason)];

function showPauseOfAll({ pause, pace }) {
  $('pause-of-all').hidden = !pause && !pace;
  $('resume-all').hidden = !pause && !pace;
  $('pause-all').hidden = Boolean(pause);
  fill($('pause-of-all'), [pause ?? null, pace ?? null], () => [
    pause ? h('div', {}, 'All subscriptions are paused ', pauseText(pause)) : '',
    pace ? h('div', {}, 'Each subscription is ', paceText(pace)) : '',
  ]);
}

function pauseCell({ pause, pace }) {
  if (!pause && !pace) return 'no';
  return [
    pause ? h('div', {}, badge('PAUSED'), ' ', pauseText(pause)) : '',
    pace ? h('div', {}, paceText(pace)) : '',
  ];
}

function showSubscriptions(status) {
  const rates = deliveredRates();
  const tbody = $('subscriptions');
  $('no-subscriptions').hidden = status.subscriptions.length > 0;
  keyed(tbody, status.subscriptions, (s) => s.name, (s) => makeSubscription(tbody, s.name), (tr, s) => {
    const delivered = rates.get(s.name);
    const numbers = [s.waiting, s.leased, s.backing_off].map((n) => number.format(n));
    const texts = [s.name, s.pattern, ...numbers, null, age(s.oldest_seconds),
      delivered === undefined ? 'unknown' : rate.format(delivered)];
    texts.forEach((text, i) => text !== null && setText(tr.cells[i], text));
    const dead = tr.querySelector('a');
    setText(dead, number.format(s.dead));
    dead.classList.toggle('alarm', s.dead > 0);
    fill(tr.cells[8], [s.pause ?? null, s.pace ?? null], () => pauseCell(s));
    const [pause, resume] = tr.cells[9].children;
    pause.hidden = Boolean(s.pause);
    resume.hidden = !s.pause && !s.pace;
  });
}

function makeSubscription(tbody, name) {
  const dead = h('a', { href: deadHash({ subscription: name }), title: `Dead events of ${name}` });
  const deed = (kind, label, start) => button(label, () => start(name),
    { 'data-test': kind, 'aria-label': `${label} ${name}` });
  const deeds = [deed('pause', 'Pause', startPause), deed('resume', 'Resume', startResume)];
  const cells = ['', '', '', '', '', dead, '', '', '', deeds];
  return row(tbody, cells, { 'data-test': 'subscription-row', 'data-name': name });
}

function showRoutes(status) {
  const tbody = $('routes');
  $('no-routes').hidden = status.routes.length > 0;
  const make = (r) => row(tbody, [idText(r.relay_id), r.route, h('span', { class: 'long' }, r.receiver), '', '', '']);
  keyed(tbody, status.routes, (r) => JSON.stringify([r.relay_id, r.route, r.receiver]), make, (tr, r) => {
    fill(tr.cells[3], r.state, () => badge(r.state));
    fill(tr.cells[4], r.state_time, () => time(r.state_time));
    fill(tr.cells[5], r.reason, () => (r.reason ? long(r.reason) : ''));
  });
}

function showFailing(status) {
  const tbody = $('failing');
  $('no-failing').hidden = status.failing.length > 0;
  const link = (f) => h('a', { href: deadHash({ ...f, code: codeOf(f.reason), failing: '1' }) }, f.type);
  const make = (f) => row(tbody, [f.subscription, link(f), '', '', '']);
  const keyOf = (f) => JSON.stringify([f.subscription, f.type, codeOf(f.reason)]);
  keyed(tbody, status.failing, keyOf, make, (tr, f) => {
    setText(tr.cells[2], number.format(f.events));
    setText(tr.cells[3], number.format(f.failures));
    fill(tr.cells[4], f.reason, () => long(f.reason));
  });
}

const codeOf = (reason) => reason.split(':', 1)[0].trim();

// ---- Charts

const AGE_STEPS = [1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14_400, 43_200, 86_400, 604_800];
const charts = new Map();

function drawCharts() {
  const points = state.history;
  if ($('view-flow').hidden || !points.length || typeof uPlot === 'undefined') return;
  const times = points.map((point) => point.now);
  const names = state.status.subscriptions.map((s) => s.name);
  const line = (read) => points.map((point) => read(point) ?? null);
  draw('chart-rates', ['in/s', 'out/s'], (v) => rate.format(v), [times, line((p) => p.in), line((p) => p.out)]);
  draw('chart-ages', names, age, [times, ...names.map((name) => line((p) => p.ages[name]))]);
}

function draw(id, names, format, data) {
  const host = $(id);
  const key = JSON.stringify([names, colour('--ink'), host.clientWidth]);
  if (charts.get(id)?.key !== key) {
    charts.get(id)?.plot.destroy();
    charts.set(id, { key, plot: new uPlot(chartOptions(host, names, format), data, host) });
    describeChart(charts.get(id).plot.root, id.replace('chart', 'caption'));
  }
  const { plot } = charts.get(id);
  plot.setData(data);
  // The plot draws in a microtask, and clears its legend there.
  queueMicrotask(() => showLast(plot));
}

// A screen reader sees nothing in a picture but its name. So the legend, which holds the values, stays outside of it.
function describeChart(root, caption) {
  const picture = root.querySelector('.u-wrap');
  picture.setAttribute('role', 'img');
  picture.setAttribute('aria-labelledby', caption);
  const legend = root.querySelector('.u-legend');
  legend.setAttribute('role', 'list');
  legend.setAttribute('aria-label', 'Values');
  for (const part of legend.querySelectorAll('tbody, th, td')) part.setAttribute('role', 'presentation');
  for (const line of legend.querySelectorAll('tr')) line.setAttribute('role', 'listitem');
}

function showLast(plot) {
  if ((plot.cursor.idx ?? null) === null) plot.setLegend({ idx: plot.data[0].length - 1 }, false);
}

// A canvas needs colours that are worked out: the style sheet names two, one for light and one for dark.
function colour(name) {
  const probe = $('theme');
  probe.style.outlineColor = `var(${name})`;
  const worked = getComputedStyle(probe).outlineColor;
  probe.style.outlineColor = '';
  return worked;
}

function chartOptions(host, names, format) {
  const grid = { stroke: colour('--line'), width: 1 };
  const axis = { stroke: colour('--faint'), grid, ticks: { show: false }, font: '12px system-ui' };
  const minute = (u, splits) => splits.map((t) => clock(new Date(t * 1000)).slice(0, 5));
  const values = (u, splits) => splits.map((value) => format(value).replace(/ 0 \w+$/, ''));
  const series = names.map((label, i) => ({
    label,
    stroke: colour(`--series-${i % 6}`),
    dash: i === 0 ? undefined : [12 - 2 * (i % 5), 3],
    width: 1.5,
    points: { show: false },
    value: (u, value) => (value === null || value === undefined ? 'unknown' : format(value)),
  }));
  const valueAxis = format === age ? { size: 84, incrs: AGE_STEPS } : { size: 56 };
  return {
    width: Math.max(200, host.clientWidth),
    height: 180,
    hooks: { setCursor: [showLast] },
    cursor: { y: false, drag: { x: false, y: false } },
    scales: {
      x: { range: (u, min, max) => [max - HISTORY_S, max] },
      y: { range: (u, min, max) => [0, Math.max(1, (max ?? 0) * 1.1)] },
    },
    axes: [{ ...axis, values: minute, space: 60, size: 28 }, { ...axis, ...valueAxis, values }],
    series: [{ label: 'at', value: (u, t) => (t ? clock(new Date(t * 1000)) : 'unknown') }, ...series],
  };
}

// ---- Dead events

const FILTERS = ['subscription', 'type', 'code'];
const dead = { filter: {}, rows: [], token: '', total: 0, seen: null };

function deadHash(filter) {
  const kept = [...FILTERS, 'failing'].filter((name) => filter[name]).map((name) => [name, filter[name]]);
  return kept.length ? `#dead?${new URLSearchParams(kept)}` : '#dead';
}

const setFilters = (filter) => FILTERS.filter((name) => filter[name]);
const filterOf = (filter) => Object.fromEntries(setFilters(filter).map((name) => [name, filter[name]]));

function showDead(params) {
  const changed = FILTERS.concat('failing').some((name) => (dead.filter[name] ?? '') !== (params[name] ?? ''));
  dead.filter = params;
  if (changed) {
    fillForm(params);
    clearDeadRows('Reading…');
  }
  $('dead-deeds').hidden = Boolean(params.failing);
  $('view-dead').classList.toggle('failing', Boolean(params.failing));
  return load('dead', async (signal) => {
    await Promise.all([readGroups(signal), readDeadPage(signal, '')]);
    dead.seen = state.status?.dead ?? null;
    showDeadChanged();
  });
}

function fillForm(filter) {
  const { elements } = $('filter');
  for (const name of FILTERS) elements[name].value = filter[name] ?? '';
  elements.failing.checked = Boolean(filter.failing);
}

function formHash() {
  const { elements } = $('filter');
  const texts = FILTERS.map((name) => [name, elements[name].value.trim()]);
  return deadHash({ ...Object.fromEntries(texts), failing: elements.failing.checked ? '1' : '' });
}

// A filter that is typed and not applied limits nothing. Whoever has typed one may think that it does.
const isFilterApplied = () => formHash() === deadHash({ ...dead.filter, failing: dead.filter.failing ? '1' : '' });

function clearDeadRows(why) {
  dead.rows = [];
  dead.total = 0;
  $('dead-rows').replaceChildren();
  $('dead-count').textContent = why;
  $('dead-more').hidden = true;
  showSelected();
}

async function readGroups(signal) {
  const { groups, left_out } = await call('GroupDeadEvents', {}, signal);
  const tbody = $('groups');
  const more = left_out ? `${counted(left_out, 'dead event')} of further groups are not shown.` : '';
  const note = groups.length ? more : 'No event is dead.';
  $('groups-note').textContent = note;
  $('groups-note').hidden = !note;
  tbody.replaceChildren(...groups.map((group) => groupRow(tbody, group)));
}

function groupRow(tbody, group) {
  const old = (Date.now() - Date.parse(group.oldest_time)) / 1000;
  const current = deadHash(group) === deadHash(dead.filter);
  const label = `Show these: ${group.code}, ${group.type}, ${group.subscription}`;
  const link = h('a', { href: deadHash(group), 'aria-current': current && 'true', 'aria-label': label }, 'Show these');
  return row(tbody, [
    group.subscription, group.type, h('code', {}, group.code), number.format(group.events),
    h('time', { datetime: group.oldest_time, title: group.oldest_time }, age(old)), long(group.reason), link,
  ], { 'data-test': 'group-row', class: current && 'current', onclick: onRow(() => link.click()) });
}

async function readDeadPage(signal, page_token) {
  const failing = Boolean(dead.filter.failing);
  const request = { ...filterOf(dead.filter), failing, page_size: PAGE, page_token };
  const answer = await call('ListDeadEvents', request, signal).catch((cause) => {
    if (!signal.aborted && !dead.rows.length) clearDeadRows('The list was not read.');
    throw cause;
  });
  if (!page_token) clearDeadRows('');
  const tbody = $('dead-rows');
  for (const event of answer.dead_events) {
    const tr = deadRow(tbody, event);
    dead.rows.push({ event, tr });
    tbody.append(tr);
  }
  dead.token = answer.next_page_token;
  dead.total = answer.total_size;
  $('dead-more').hidden = !dead.token;
  const noun = failing ? 'failing event' : 'dead event';
  const which = setFilters(dead.filter).length ? ' that match the filter' : '';
  const total = dead.total ? `${number.format(dead.rows.length)} of ${counted(dead.total, noun)}` : `No ${noun}`;
  $('dead-count').textContent = `${total}${which}`;
  showSelected();
}

function deadRow(tbody, event) {
  const name = `event ${event.event_id} of ${event.subscription}`;
  const box = h('input', { type: 'checkbox', 'aria-label': `Select ${name}`, onchange: showSelected });
  const details = button('Details', () => toggleDetails(tr, event, details),
    { 'aria-expanded': 'false', 'aria-label': `Details of ${name}` });
  const tr = row(tbody, [
    box, journeyLink(event.event_id), event.type, [journeyLink(event.subject), ` no.\u00a0${event.sequence}`],
    event.subscription, h('span', { title: counted(event.failures, 'failure') }, number.format(event.attempts)),
    h('time', { datetime: event.create_time, title: event.create_time }, age(event.age_seconds)),
    number.format(event.held_back), long(event.reason), details,
  ], { 'data-test': 'dead-row', 'data-event': event.event_id, onclick: onRow(() => details.click()) });
  return tr;
}

async function toggleDetails(tr, event, control) {
  const open = control.getAttribute('aria-expanded') === 'true';
  control.setAttribute('aria-expanded', String(!open));
  if (open) return void tr.nextElementSibling.remove();
  const box = h('td', { role: 'cell', colspan: tr.cells.length }, 'Reading…');
  tr.after(h('tr', { role: 'row', class: 'details' }, box));
  try {
    box.replaceChildren(dead.filter.failing ? eventFacts(event) : await readContent(event));
  } catch (cause) {
    box.replaceChildren(h('p', { class: 'error', 'data-test': 'error', role: 'alert' }, explain(cause)));
  }
}

function facts(pairs) {
  return h('dl', { class: 'facts' }, pairs.map(([name, value]) => h('div', {}, h('dt', {}, name), h('dd', {}, value))));
}

function eventFacts(event, more = []) {
  return facts([
    ['Event', journeyLink(event.event_id, event.event_id)], ['Subject', journeyLink(event.subject, event.subject)],
    ['Enqueued', time(event.create_time)], ['Attempts', number.format(event.attempts)],
    ['Failures', number.format(event.failures)], ...more, ['Reason', event.reason],
  ]);
}

async function readContent({ event_id, subscription }) {
  const content = await call('GetDeadEvent', { event_id });
  const traces = [['Trace parent', content.traceparent], ['Trace state', content.tracestate]];
  const before = ['Attempts before its requeue', number.format(content.attempts_before_requeue)];
  const block = (label, text) => h('pre', { tabindex: '0', 'aria-label': label }, text);
  return h('div', {},
    eventFacts(content.event, [before, ...traces.filter(([, text]) => text)]),
    h('h4', {}, 'Payload'),
    content.payload_json ? block('Payload', pretty(content.payload_json))
      : [h('p', {}, `The payload cannot be decoded: ${content.undecodable}`), block('Bytes in base64', content.data)],
    h('div', { class: 'buttons act' }, deedsOfDead(event_id, subscription)));
}

function deedsOfDead(event_id, subscription) {
  const parts = [{ event_ids: [event_id], subscription }];
  return [button('Requeue', () => startDeed('requeue', parts)), button('Discard', () => startDeed('discard', parts))];
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}

const selectedRows = () => dead.rows.filter(({ tr }) => tr.querySelector('input').checked);

function showSelected() {
  const selected = selectedRows().length;
  setText($('selected'), selected ? `${counted(selected, 'event')} selected` : 'None selected');
  $('requeue').disabled = $('discard').disabled = selected === 0;
  const applied = isFilterApplied();
  $('requeue-all').disabled = $('discard-all').disabled = dead.total === 0 || !applied;
  setText($('filter-note'), applied ? '' : 'The filter was changed. Press “Filter” first.');
  const which = setFilters(dead.filter).length ? 'all that match' : 'all';
  setText($('requeue-all'), `Requeue ${which}`);
  setText($('discard-all'), `Discard ${which}`);
  $('select-all').checked = selected > 0 && selected === dead.rows.length;
}

function showDeadChanged() {
  const more = (state.status?.dead ?? 0) - (dead.seen ?? state.status?.dead ?? 0);
  const change = `${counted(Math.abs(more), 'dead event')} ${more > 0 ? 'more' : 'fewer'}`;
  setText($('dead-changed'), more ? `${change} since this was read` : '');
}

// An event can be dead in two subscriptions, and be selected in one. So each subscription is a part of its own.
function selectedParts() {
  const bySubscription = Map.groupBy(selectedRows(), ({ event }) => event.subscription);
  return [...bySubscription].map(([subscription, rows]) => (
    { event_ids: rows.map(({ event }) => event.event_id), subscription }));
}

function startSelected(kind) {
  const parts = selectedParts();
  if (parts.some((part) => part.event_ids.length > MOST_NAMED)) {
    const most = number.format(MOST_NAMED);
    setText($('selected'), `More than ${most} are selected. Select fewer, or filter and take all.`);
    return;
  }
  startDeed(kind, parts);
}

// ---- Journey

let journeyId = '';

function showJourney(text) {
  const id = UUID.test(text) ? canonical(text) : text;
  if (id !== journeyId) {
    $('journey-body').replaceChildren(h('p', { class: 'faint' }, 'Reading the outbox and asking the receivers…'));
    $('journey-deeds').hidden = true;
    $('journey-note').hidden = true;
    setText($('journey-reading'), '');
  }
  journeyId = id;
  return load('journey', async (signal) => {
    if (!UUID.test(id)) throw new Error('A journey needs the UUID of a subject or an event. Search for one.');
    const journey = await call('GetJourney', { id }, signal).catch((cause) => {
      if (!signal.aborted) $('journey-body').replaceChildren();
      throw cause;
    });
    setText($('journey-reading'), `read at ${clock(new Date(journey.time))}`);
    $('journey-body').replaceChildren(...journeyParts(journey, id));
    await readJourneyDeeds(journey, id, signal);
  });
}

function journeyParts(journey, id) {
  const bySequence = new Map();
  for (const item of [...journey.events, ...journey.applied]) {
    const key = `${String(item.sequence).padStart(20, '0')} ${item.event_id}`;
    const { event_id, sequence } = item;
    const step = bySequence.get(key) ?? { event_id, sequence, type: '', events: [], applied: [] };
    step.type ||= item.type ?? '';
    (item.state ? step.events : step.applied).push(item);
    bySequence.set(key, step);
  }
  const steps = [...bySequence].sort(([a], [b]) => (a < b ? -1 : 1)).map(([, step]) => stepItem(step, journey, id));
  return [
    h('p', {}, 'Subject ', h('code', {}, journey.subject)),
    journey.unanswered.length ? h('div', { class: 'notice' }, h('h3', {}, 'Not everybody answered'),
      h('ul', {}, journey.unanswered.map((text) => h('li', { class: 'long' }, text)))) : '',
    steps.length ? h('ol', { class: 'timeline' }, steps)
      : h('p', { class: 'empty' }, 'Nothing is left of its events, and no receiver has applied one.'),
    journey.left_out ? h('p', { class: 'notice' }, `Not shown: ${counted(journey.left_out, 'later event')}.`) : '',
  ].filter(Boolean);
}

function stepItem(step, journey, id) {
  const asked = step.event_id === id;
  const created = step.events[0]?.create_time;
  return h('li', { class: asked ? 'asked' : null, 'data-event': step.event_id },
    h('h3', {}, `${step.sequence}. ${step.type || 'Event'}`),
    h('p', { class: 'faint' }, journeyLink(step.event_id), asked ? ' (the event that you asked for)' : '',
      created ? [', enqueued ', time(created)] : ''),
    step.events.map((event) => queuedPart(event, journey)),
    step.applied.map((applied) => h('div', { class: 'part' },
      h('p', {}, badge('APPLIED'), ` by ${applied.subscription} at `, time(applied.apply_time)))));
}

function queuedPart(event, journey) {
  const { subscription } = event;
  const deeds = {
    STATE_DEAD: deedsOfDead(event.event_id, subscription),
    STATE_DISCARDED: [button('Restore', () => startDeed('restore', [{ event_id: event.event_id, subscription }]))],
  }[event.state];
  return h('div', { class: 'part' },
    h('p', {}, badge(event.state), subscription ? ` for ${subscription}` : ' for no subscription',
      `, ${counted(event.attempts, 'attempt')}, ${counted(event.failures, 'failure')}`),
    event.reason ? h('p', {}, 'Last failure: ', long(event.reason)) : '',
    h('ul', {}, event.causes.map((cause) => causeItem(cause, journey.time))),
    deeds ? h('div', { class: 'buttons act' }, deeds) : '');
}

function causeItem(cause, now) {
  const left = (Date.parse(cause.until) - Date.parse(now)) / 1000;
  return h('li', { 'data-test': 'cause', 'data-kind': cause.kind, class: 'long' }, cause.text,
    cause.until ? [' (until ', time(cause.until), left > 0 ? `, in ${age(left)})` : ')'] : '',
    cause.event_id ? [' (see ', journeyLink(cause.event_id), ')'] : '');
}

async function readJourneyDeeds(journey, id, signal) {
  const ids = [...new Set([...journey.events, ...journey.applied].map((item) => item.event_id))];
  const rank = (event_id) => (event_id === id ? 0 : 1);
  const asked = ids.toSorted((a, b) => rank(a) - rank(b)).slice(0, MOST_LOOKED_UP);
  const byId = new Map();
  // One after the other: a journey should not take all connections of the relay.
  for (const event_id of asked) {
    const answer = await call('ListDeeds', { event_id, page_size: 50 }, signal);
    for (const deed of answer.deeds) byId.set(deed.deed_id, deed);
  }
  const deeds = [...byId.values()].sort((a, b) => b.deed_id - a.deed_id);
  const tbody = $('journey-deed-rows');
  tbody.replaceChildren(...deeds.map((deed) => deedRow(tbody, deed)));
  $('journey-deeds').hidden = deeds.length === 0;
  const none = deeds.length ? '' : 'No deed has changed these events. ';
  const some = asked.length < ids.length ? `Deeds were looked up for ${asked.length} of its ${ids.length} events.` : '';
  $('journey-note').textContent = none + some;
  $('journey-note').hidden = !(none + some);
}

// ---- Deeds, those that were done

const DEED_COLUMNS = ['Deed', 'Time', 'What', 'Who', 'Subscription', 'About', 'Events', 'Reason', 'Undo'];
let deedsToken = '';

function addDeedHead(table) {
  const kinds = { Events: 'num', Reason: 'wide', About: 'wide' };
  const heads = DEED_COLUMNS.map((name) => h('th', { scope: 'col', class: kinds[name] }, name));
  table.prepend(h('thead', {}, h('tr', {}, heads)));
}

const OF_EVENTS = ['KIND_REQUEUE', 'KIND_DISCARD', 'KIND_RESTORE'];

// A part of a deed's events may be left to undo. Of a pause, nothing is left.
function undoCell(deed) {
  const undone = deed.undone_by > 0;
  const label = undone ? 'Undo the rest' : 'Undo';
  const offered = deed.can_undo && (!undone || OF_EVENTS.includes(deed.kind));
  const name = `${label}${undone ? ' of' : ''} deed ${deed.deed_id}`;
  return [
    undone ? h('div', {}, 'undone by ', deedLink(deed.undone_by)) : '',
    offered ? button(label, () => startUndo(deed), { 'data-test': 'undo', class: 'act', 'aria-label': name }) : '',
  ];
}

function deedRow(tbody, deed, wanted = 0) {
  const what = words(deed.kind) + (deed.undoes ? ` of deed ${deed.undoes}` : '');
  return row(tbody, [
    String(deed.deed_id), time(deed.time), what, deed.done_by, deed.subscription || 'all', long(deed.about),
    number.format(deed.events), long(deed.reason), undoCell(deed),
  ], { 'data-test': 'deed-row', 'data-deed': deed.deed_id, class: deed.deed_id === wanted && 'current' });
}

function showDeeds(params, more = false) {
  const wanted = Number(params.deed ?? 0);
  return load('deeds', async (signal) => {
    const answer = await call('ListDeeds', { page_size: PAGE, page_token: more ? deedsToken : '' }, signal);
    const tbody = $('deed-rows');
    if (!more) tbody.replaceChildren();
    tbody.append(...answer.deeds.map((deed) => deedRow(tbody, deed, wanted)));
    deedsToken = answer.next_page_token;
    $('deeds-more').hidden = !deedsToken;
    const found = tbody.querySelector('.current');
    found?.scrollIntoView({ block: 'center' });
    const further = deedsToken ? ` Press “Show more” to find it.` : '';
    const missing = wanted && !found ? `Deed ${wanted} is not among these.${further}` : '';
    const note = tbody.rows.length ? missing : 'No deed has been done yet.';
    $('deeds-note').textContent = note;
    $('deeds-note').hidden = !note;
  });
}

// ---- Deeds, to be done

const DEEDS = {
  requeue: { method: 'RequeueDeadEvents', title: 'Requeue dead events', done: 'requeued', blast: requeueBlast },
  discard: { method: 'DiscardDeadEvents', title: 'Discard dead events', done: 'discarded', blast: discardBlast },
  restore: { method: 'RestoreDiscardedEvent', title: 'Restore a discarded event', done: 'restored' },
  pause: { method: 'Pause', title: 'Pause' },
  resume: { method: 'Resume', title: 'Resume' },
  undo: { method: 'UndoDeed', title: 'Undo a deed', done: 'undone' },
};
const NEED_REASON = ['discard', 'pause'];

function requeueBlast(radius, all) {
  const old = radius.too_old;
  if (!old) return `Requeues ${reach(radius.events, radius)}.`;
  if (all) return `Requeues ${reach(radius.events - old, radius)}; ${atLeast(radius)}${stayDead(old)}.`;
  const refused = `But ${number.format(old)} of them ${old === 1 ? 'is' : 'are'} too old, so the relay refuses this.`;
  return `Requeues ${reach(radius.events, radius)}. ${refused} Leave out what is too old, or discard it.`;
}

const stayDead = (n) => (n === 1 ? '1 is too old and stays dead' : `${number.format(n)} are too old and stay dead`);

function discardBlast(radius) {
  return `Discards ${reach(radius.events, radius)}. No receiver gets these unless they are restored and requeued.`;
}

// Of many dead events, only the first are looked at.
const atLeast = (radius) => (radius.more ? 'at least ' : '');

function reach(events, radius) {
  const least = atLeast(radius);
  const freed = radius.held_back ? `; frees ${least}${number.format(radius.held_back)} that wait behind them` : '';
  return `${least}${counted(events, 'event')} of ${counted(radius.subjects, 'subject')}${freed}`;
}

function blastText(job) {
  const { radius, spec, parts } = job;
  if (radius.events) return spec.blast(radius, Boolean(parts[0].all));
  if (radius.more) return 'None of the first 50,000 dead events matches. Later ones may.';
  return 'No event that is dead matches now. Nothing would change.';
}

function resumeBlast(pace, which) {
  if (!pace) return `Ends the pause of ${which}: relays deliver the events again.`;
  return `Ends the pace of ${eventsPerSecond(pace.events_per_second)} for ${which}: `
    + 'relays deliver as fast as they can.';
}

const eventsPerSecond = (n) => `${counted(n, 'event')} per second`;

function plainBlast({ kind, parts, about, pace }) {
  const which = parts[0].subscription ? `the subscription ${parts[0].subscription}` : 'all subscriptions';
  return {
    restore: 'Brings the event back, dead as it was. Later events of its subject wait for it again. '
      + 'Requeue it, so that it is delivered.',
    pause: `Pauses ${which}: relays lease no event until you resume. Leased events are still delivered.`,
    resume: resumeBlast(pace, which),
    undo: `Undoes ${about}. Events that have changed since stay as they are.`,
  }[kind];
}

function scopeText(parts) {
  return parts.map((part) => {
    const limits = FILTERS.filter((name) => part[name]).map((name) => `${name} ${part[name]}`);
    const events = part.all ? 'all dead events' : part.event_ids && counted(part.event_ids.length, 'event');
    return [events, ...limits].filter(Boolean).join(', ');
  }).filter(Boolean).join('; ');
}

function startUndo(deed) {
  const what = [words(deed.kind), counted(deed.events, 'event'), deed.about].filter(Boolean).join(', ');
  startDeed('undo', [{ deed_id: deed.deed_id }], { about: `deed ${deed.deed_id} (${what})` });
}

function startPause(subscription) {
  startDeed('pause', [{ subscription }]);
}

function startResume(subscription) {
  const { status } = state;
  const { pause, pace } = status.subscriptions.find(({ name }) => name === subscription) ?? status;
  startDeed('resume', [{ subscription }], { pace: pause ? null : pace });
}

function startDeed(kind, parts, { about = '', pace = null } = {}) {
  const job = {
    kind, spec: DEEDS[kind], needsReason: NEED_REASON.includes(kind), parts, about, pace,
    part: 0, token: '', running: false, stopped: false, halted: false, finished: false, inDoubt: false,
    inputs: {}, radius: null, countedAt: 0, sums: {}, remaining: 0, deeds: new Set(),
  };
  const view = deedDialog(job);
  document.body.append(view.dialog);
  view.dialog.addEventListener('cancel', (event) => {
    if (!job.running) return;
    event.preventDefault();
    job.stopped = true;
  });
  view.dialog.addEventListener('close', () => {
    // A browser closes a dialog on the second Escape, whatever the page says. A running deed stays in sight.
    if (job.running) {
      job.stopped = true;
      view.dialog.showModal();
      return;
    }
    view.dialog.remove();
    if (job.deeds.size || job.finished) showOutcome(job);
    else if (job.inDoubt) readAgain();
  });
  view.cancel.addEventListener('click', () => view.dialog.close());
  view.stop.addEventListener('click', () => {
    job.stopped = true;
    view.stop.disabled = true;
  });
  view.form.addEventListener('submit', (event) => {
    event.preventDefault();
    confirmDeed(job, view);
  });
  view.dialog.showModal();
  view.cancel.focus();
  measureBlast(job, view);
}

function deedDialog(job) {
  const view = {
    blast: h('p', { 'data-test': 'blast', class: 'blast', role: 'status' }, 'Counting what this would change…'),
    again: button('Count again', () => measureBlast(job, view), { hidden: true }),
    reason: h('textarea', {
      id: 'deed-reason', 'data-test': 'reason-input', rows: 3, maxlength: 1000,
      'aria-required': String(job.needsReason), 'aria-describedby': 'deed-error',
    }),
    reasonLabel: h('label', { for: 'deed-reason' }, job.needsReason ? 'Reason (required)' : 'Reason (optional)'),
    perSecond: job.kind === 'resume' && !job.pace ? perSecondInput() : null,
    error: h('p', { id: 'deed-error', class: 'error', 'data-test': 'error', role: 'alert', hidden: true }),
    progress: h('p', { class: 'progress', role: 'status' }),
    confirm: h('button', { type: 'submit', class: 'primary', 'data-test': 'confirm', disabled: true }, 'Confirm'),
    cancel: button('Cancel', null, { 'data-test': 'cancel' }),
    stop: button('Stop', null, { 'data-test': 'stop', hidden: true }),
  };
  const scope = scopeText(job.parts);
  view.form = h('form', { novalidate: true },
    h('h2', { id: 'title-deed' }, job.spec.title), scope ? h('p', { class: 'long faint' }, scope) : '',
    view.blast, view.again,
    view.perSecond ? h('label', { for: 'deed-per-second' }, 'At most so many events per second (optional)') : '',
    view.perSecond, view.reasonLabel, view.reason, view.error, view.progress,
    h('div', { class: 'buttons' }, view.confirm, view.cancel, view.stop));
  view.dialog = h('dialog', { 'aria-labelledby': 'title-deed' }, view.form);
  return view;
}

function perSecondInput() {
  return h('input', {
    id: 'deed-per-second', 'data-test': 'per-second', type: 'number', min: 1, max: MOST_PER_SECOND, step: 1,
    autocomplete: 'off', 'aria-describedby': 'deed-error',
  });
}

async function measureBlast(job, view) {
  view.again.hidden = true;
  view.confirm.disabled = true;
  showDeedError(view, '');
  if (!job.spec.blast) {
    view.blast.textContent = plainBlast(job);
    view.confirm.disabled = false;
    return;
  }
  view.blast.textContent = 'Counting what this would change…';
  try {
    job.radius = await readRadius(job.parts);
    job.countedAt = Date.now();
    view.blast.textContent = blastText(job);
    view.confirm.disabled = !job.radius.events && !job.radius.more;
  } catch (cause) {
    view.blast.textContent = 'It is not known what this would change.';
    view.again.hidden = false;
    showDeedError(view, explain(cause));
  }
}

async function readRadius(parts) {
  const radii = await Promise.all(parts.map((part) => call('GetBlastRadius', part)));
  const radius = { more: radii.some((part) => part.more) };
  for (const name of ['events', 'subjects', 'held_back', 'too_old']) {
    radius[name] = radii.reduce((sum, part) => sum + part[name], 0);
  }
  return radius;
}

// A dialog may stay open for hours. Whoever confirms should have seen what they confirm.
async function isCountRight(job, view) {
  const begun = job.part > 0 || job.token;
  if (!job.spec.blast || begun || Date.now() - job.countedAt < COUNT_HOLDS_MS) return true;
  const before = JSON.stringify(job.radius);
  await measureBlast(job, view);
  if (!view.dialog.open) return false;
  const isKnown = view.again.hidden;
  if (isKnown && JSON.stringify(job.radius) === before) return true;
  if (isKnown) showDeedError(view, 'The count has changed since you looked. Read it, and confirm again.');
  view.cancel.focus();
  return false;
}

function showDeedError(view, text, wrong = null) {
  showError(view.error, text);
  for (const input of [view.reason, view.perSecond]) {
    if (input) markWrong(input, input === wrong);
  }
}

// Returns nothing if an input is wrong, and says which.
function readInputs(job, view) {
  const reason = view.reason.value.replace(/\p{Cc}+/gu, ' ').trim();
  const { perSecond } = view;
  if (perSecond && !perSecond.validity.valid) {
    const most = number.format(MOST_PER_SECOND);
    return refuseInput(view, `Give a whole number from 1 to ${most} events per second, or none.`, perSecond);
  }
  if (job.needsReason && !reason) return refuseInput(view, 'Say why: this deed needs a reason.', view.reason);
  return perSecond?.value ? { reason, events_per_second: Number(perSecond.value) } : { reason };
}

function refuseInput(view, text, input) {
  showDeedError(view, text, input);
  input.focus();
}

async function confirmDeed(job, view) {
  if (job.running || view.confirm.disabled) return;
  const inputs = readInputs(job, view);
  if (!inputs) return;
  showDeedError(view, '');
  if (!(await isCountRight(job, view))) return;
  job.inputs = inputs;
  setRunning(job, view, true);
  try {
    await runDeed(job, view);
    job.finished = true;
    view.dialog.close();
  } catch (cause) {
    showFailure(job, view, cause);
  } finally {
    setRunning(job, view, false);
  }
}

function showFailure(job, view, cause) {
  job.inDoubt ||= isInDoubt(cause);
  const doubt = isInDoubt(cause) ? ' The change may have been made: look before you confirm again.' : '';
  const sofar = job.deeds.size ? ` ${doneText(job)} Confirm goes on from there.` : '';
  if (!job.deeds.size) view.progress.textContent = '';
  showDeedError(view, `${explain(cause)}${doubt}${sofar}`);
}

function setRunning(job, view, running) {
  job.running = running;
  job.stopped &&= running;
  view.confirm.disabled = view.cancel.disabled = running;
  if (view.perSecond) view.perSecond.readOnly = running;
  // The relay has written the reason with the first piece. What is typed later would be lost.
  view.reason.readOnly = running || Boolean(job.token);
  if (job.token) view.reasonLabel.textContent = 'Reason (fixed, since the deed has begun)';
  view.stop.hidden = !running;
  view.stop.disabled = false;
  if (running) view.stop.focus();
  else if (view.dialog.open) view.confirm.focus();
}

async function runDeed(job, view) {
  if (job.inputs.events_per_second) view.progress.textContent = 'Waiting up to 5 s until every relay knows the pace…';
  while (job.part < job.parts.length && !job.halted) {
    const request = { ...job.parts[job.part], ...job.inputs };
    if (job.token) request.token = job.token;
    const answer = await call(job.spec.method, request);
    for (const name of ['requeued', 'discarded', 'restored', 'undone', 'freed', 'too_old', 'left']) {
      job.sums[name] = (job.sums[name] ?? 0) + (answer[name] ?? 0);
    }
    job.remaining = answer.remaining ?? 0;
    if (answer.deed_id) job.deeds.add(answer.deed_id);
    job.token = answer.next_token ?? '';
    if (!job.token) job.part += 1;
    job.halted = job.stopped && job.part < job.parts.length;
    view.progress.textContent = doneText(job);
  }
}

function pauseDone({ kind, parts, pace, inputs }) {
  const name = parts[0].subscription;
  const which = name || 'all subscriptions';
  if (kind === 'pause') return `Paused ${which}.`;
  if (pace) return `Ended the pace of ${eventsPerSecond(pace.events_per_second)} for ${which}.`;
  const most = inputs.events_per_second;
  const slowly = most ? `, ${name ? '' : 'each '}at most ${eventsPerSecond(most)}` : '';
  return `Resumed ${which}${slowly}.`;
}

function doneText(job) {
  const { sums, spec } = job;
  if (!spec.done) return pauseDone(job);
  // A pause has no events that could be counted.
  if (job.kind === 'undo' && !sums.undone && !sums.left) return 'Undone.';
  const some = [`${spec.done} ${number.format(sums[spec.done] ?? 0)}`];
  if (sums.freed) some.push(`freed ${number.format(sums.freed)} that waited behind them`);
  if (sums.too_old) some.push(stayDead(sums.too_old));
  if (sums.left) some.push(`${counted(sums.left, 'event')} changed since and stayed so`);
  if (job.remaining) some.push(`${number.format(job.remaining)} left`);
  const text = some.join('; ');
  return `${text[0].toUpperCase()}${text.slice(1)}.`;
}

function showOutcome(job) {
  const deeds = [...job.deeds];
  const undo = (id) => button(`Undo deed ${id}`, () => startDeed('undo', [{ deed_id: id }], { about: `deed ${id}` }),
    { 'data-test': 'undo', class: 'act' });
  // The end of a pace cannot be undone: whoever wants a pace again says how fast.
  const canUndo = job.kind !== 'undo' && !job.pace;
  const end = job.halted ? ' You stopped it. Start it again to go on.' : ' It did not finish.';
  const links = deeds.map((id, i) => [i ? ', ' : ' See ', deedLink(id)]);
  const box = h('div', { class: 'outcome', 'data-test': 'outcome', tabindex: '-1' },
    h('p', {}, doneText(job), job.finished && !job.halted ? '' : end, links, links.length ? '.' : ''),
    h('div', { class: 'buttons' }, canUndo ? deeds.map(undo) : '', button('Dismiss', () => box.remove())));
  $('outcomes').replaceChildren(box);
  box.focus();
  readAgain();
}

function readAgain() {
  poll();
  show();
}

// ---- Doctor

function examine() {
  setText($('doctor-reading'), 'examining…');
  $('examine').disabled = true;
  return load('doctor', async (signal) => {
    const diagnosis = await call('Diagnose', {}, signal);
    setText($('doctor-reading'), `read at ${clock(new Date(diagnosis.time))}`);
    const groups = Map.groupBy(diagnosis.findings, (finding) => finding.severity);
    $('findings').replaceChildren(...[...groups].flatMap(([severity, findings]) => [
      h('h3', {}, badge(severity), ` ${counted(findings.length, 'finding')}`),
      h('ul', { class: 'findings' }, findings.map(findingItem)),
    ]));
  }).finally(() => {
    if ($('doctor-reading').textContent === 'examining…') setText($('doctor-reading'), '');
    $('examine').disabled = false;
  });
}

function findingItem(finding) {
  return h('li', { 'data-test': 'finding', 'data-severity': finding.severity },
    h('strong', {}, finding.about), h('p', { class: 'long' }, finding.text),
    finding.todo ? h('p', { class: 'long todo' }, h('strong', {}, 'To do: '), finding.todo) : '');
}

// ---- Search and navigation

function search(event) {
  event.preventDefault();
  const text = $('search').value.trim();
  if (!text) return;
  if (UUID.test(text)) location.hash = `#journey/${text}`;
  else if (text.includes('.') && !/[\s:]/.test(text)) location.hash = deadHash({ type: text });
  else location.hash = deadHash({ code: codeOf(text) });
}

function place() {
  const [path, query = ''] = location.hash.slice(1).split('?', 2);
  const [view, id = ''] = path.split('/', 2);
  return { view: $(`view-${view}`) ? view : 'flow', id, params: Object.fromEntries(new URLSearchParams(query)) };
}

const SHOW = {
  flow: () => drawCharts(),
  dead: ({ params }) => showDead(params),
  journey: ({ id }) => showJourney(id),
  deeds: ({ params }) => showDeeds(params),
  doctor: () => {},
};

let shownView = '';

function show() {
  const to = place();
  for (const section of document.querySelectorAll('main > section')) section.hidden = section.id !== `view-${to.view}`;
  for (const link of document.querySelectorAll('nav a')) {
    if (link.hash === `#${to.view}`) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
  const title = $(`title-${to.view}`);
  document.title = `${title.textContent}: outbox console`;
  if (shownView && shownView !== to.view) title.focus();
  shownView = to.view;
  if (state.me) SHOW[to.view](to);
}

const THEMES = ['system', 'light', 'dark'];

function setTheme(theme) {
  remember('localStorage', THEME_KEY, theme);
  document.documentElement.dataset.theme = theme;
  $('theme').textContent = `Theme: ${theme}`;
  drawCharts();
}

function nextTheme() {
  const now = THEMES.indexOf(document.documentElement.dataset.theme);
  setTheme(THEMES[(now + 1) % THEMES.length]);
}

function filterList(event) {
  event.preventDefault();
  location.hash = formHash();
}

function clearFilter() {
  fillForm({});
  showSelected();
}

function selectAll(event) {
  for (const { tr } of dead.rows) tr.querySelector('input').checked = event.target.checked;
  showSelected();
}

function focusSearch(event) {
  if (event.key !== '/' || event.target.closest('input, textarea, select, dialog')) return;
  event.preventDefault();
  $('search').focus();
}

function start() {
  document.querySelectorAll('table.deeds').forEach(addDeedHead);
  document.querySelectorAll('table').forEach(giveRoles);
  setTheme(THEMES.find((theme) => theme === recall('localStorage', THEME_KEY)) ?? 'system');
  const on = (id, type, handler) => $(id).addEventListener(type, handler);
  on('theme', 'click', nextTheme);
  on('skip', 'click', (event) => { event.preventDefault(); $('main').focus(); });
  on('search-form', 'submit', search);
  on('token-form', 'submit', useToken);
  on('token-later', 'click', () => $('token-dialog').close());
  on('token-dialog', 'close', clearTokenDialog);
  on('banner-token', 'click', openTokenDialog);
  on('other-token', 'click', openTokenDialog);
  on('pause-all', 'click', () => startPause(''));
  on('resume-all', 'click', () => startResume(''));
  on('filter', 'submit', filterList);
  on('filter', 'input', showSelected);
  on('filter-clear', 'click', clearFilter);
  on('select-all', 'change', selectAll);
  for (const kind of ['requeue', 'discard']) {
    on(kind, 'click', () => startSelected(kind));
    on(`${kind}-all`, 'click', () => startDeed(kind, [{ all: true, ...filterOf(dead.filter) }]));
  }
  on('dead-refresh', 'click', () => showDead(dead.filter));
  on('dead-more', 'click', () => load('dead', (signal) => readDeadPage(signal, dead.token)));
  on('journey-refresh', 'click', () => showJourney(journeyId));
  on('deeds-refresh', 'click', () => showDeeds(place().params));
  on('deeds-more', 'click', () => showDeeds(place().params, true));
  on('examine', 'click', examine);
  document.addEventListener('keydown', focusSearch);
  document.addEventListener('visibilitychange', poll);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', drawCharts);
  addEventListener('resize', drawCharts);
  addEventListener('hashchange', show);
  show();
  poll();
}

start();
