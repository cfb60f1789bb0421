// Replay traces: every lane shows the cells that its decoder has committed at this moment.
"use strict";

for (const root of document.querySelectorAll(".race")) {
  const data = JSON.parse(document.getElementById(root.dataset.race).textContent);
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const find = (name) => root.querySelector(name);
  const [play, again, seek, heat, slider] = [".play", ".again", ".seek", ".heat", ".rate-slider"].map(find);
  const total = data.rows * data.columns;
  const places = ["1st", "2nd", "3rd"];
  let now = 0; // seconds of the race
  let speed = 1;
  let playing = false;
  let before = 0; // time stamp of the last frame
  let next = 0; // the requested frame
  let lanes = [];
  let longest = 0;
  let seen = null; // starts the race when it comes into view, unless already started

  const sums = (steps, unit) => {
    let sum = 0;
    return steps.map((step) => (sum += step) * unit);
  };

  const figures = [...root.querySelectorAll(".lane")].map((figure) => ({
    figure,
    canvas: figure.querySelector("canvas"),
    rank: figure.querySelector(".rank"),
    track: figure.querySelector(".track i"),
    passes: figure.querySelector(".passes"),
    time: figure.querySelector(".time"),
    rate: figure.querySelector(".rate"),
  }));

  function load(index) {
    const entry = data.heats[index];
    find(".full-prompt").textContent = entry.prompt;
    lanes = [];
    entry.lanes.forEach((lane, place) => {
      const parts = figures[place];
      parts.figure.hidden = lane === null;
      if (lane === null) return;
      const image = new Image();
      const made = {
        ...parts,
        image,
        ...data.lanes[place],
        times: sums(lane.times, data.unit),
        cells: sums(lane.cells, 1),
        first: lane.passes,
        tokens: lane.tokens,
        order: lane.order || null,
        shown: -2, // the pass shown; -1: none yet
        painted: -1, // the cells painted; -1: the canvas is new
        ready: false,
      };
      image.onload = () => {
        made.ready = true;
        const scale = Math.max(1, Math.ceil(192 / image.width));
        made.canvas.width = image.width * scale;
        made.canvas.height = image.height * scale;
        made.canvas.style.imageRendering = image.width < 128 ? "pixelated" : "auto";
        [made.shown, made.painted] = [-2, -1];
        draw(made);
      };
      image.src = lane.image;
      lanes.push(made);
    });
    const ends = lanes.map((lane) => lane.times.at(-1)).sort((a, b) => a - b);
    for (const lane of lanes) lane.place = ends.indexOf(lane.times.at(-1));
    longest = ends.at(-1);
  }

  // the number of passes that have ended by `moment`, found by bisection
  function passed(times, moment) {
    let [low, high] = [0, times.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (times[middle] <= moment) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  function box(lane, cell) {
    const [w, h] = [lane.canvas.width, lane.canvas.height];
    const [row, column] = [Math.floor(cell / data.columns), cell % data.columns];
    const [x, y] = [Math.round((column * w) / data.columns), Math.round((row * h) / data.rows)];
    return [x, y, Math.round(((column + 1) * w) / data.columns) - x, Math.round(((row + 1) * h) / data.rows) - y];
  }

  function paint(lane, context, cell) {
    const [x, y, w, h] = box(lane, cell);
    const scale = lane.image.width / lane.canvas.width;
    context.drawImage(lane.image, x * scale, y * scale, w * scale, h * scale, x, y, w, h);
  }

  // forwards only the new cells are painted; backwards, or at first, all of them
  function fill(lane, context, cells) {
    const style = getComputedStyle(root);
    const at = (cell) => (lane.order ? lane.order[cell] : cell);
    let drafted = lane.painted + lane.ahead;
    if (lane.painted < 0 || cells < lane.painted) {
      context.fillStyle = style.getPropertyValue("--blank");
      context.fillRect(0, 0, lane.canvas.width, lane.canvas.height);
      lane.painted = drafted = 0;
    }
    context.fillStyle = style.getPropertyValue("--draft");
    for (let cell = Math.max(drafted, cells); cell < Math.min(total, cells + lane.ahead); cell++) context.fillRect(...box(lane, at(cell)));
    for (let cell = lane.painted; cell < cells; cell++) paint(lane, context, at(cell));
    lane.painted = cells;
  }

  function draw(lane) {
    const ended = passed(lane.times, now);
    if (!lane.ready || ended - 1 === lane.shown) return;
    lane.shown = ended - 1;
    const done = ended === lane.times.length;
    const cells = ended ? lane.cells[ended - 1] : 0;
    const context = lane.canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    if (done) {
      context.drawImage(lane.image, 0, 0, lane.canvas.width, lane.canvas.height);
      lane.painted = total;
    } else {
      fill(lane, context, cells);
    }
    lane.track.style.width = `${(100 * cells) / total}%`;
    lane.passes.textContent = ended ? lane.first + ended - 1 : 0;
    lane.figure.classList.toggle("done", done);
    lane.time.textContent = done ? `in ${lane.times.at(-1).toFixed(2)} s` : "";
    lane.rate.textContent = done ? `${(lane.tokens / (lane.first + ended - 1)).toFixed(2)} tokens per pass` : "\u00a0";
    lane.rank.textContent = done ? places[lane.place] || `${lane.place + 1}th` : "";
  }

  function show() {
    for (const lane of lanes) draw(lane);
    find(".now").textContent = now.toFixed(2);
    seek.value = Math.round((1000 * now) / longest);
    seek.setAttribute("aria-valuetext", `${now.toFixed(2)} of ${longest.toFixed(2)} seconds`);
    play.textContent = playing ? "Pause" : now >= longest ? "Play again" : "Play";
    play.setAttribute("aria-label", playing ? "pause" : "play");
  }

  function frame(stamp) {
    if (!playing) return;
    now = Math.min(longest, now + (Math.max(0, stamp - before) / 1000) * speed);
    before = stamp;
    if (now >= longest) {
      playing = false;
      const best = lanes.reduce((a, b) => (a.place <= b.place ? a : b));
      find(".announcement").textContent = `${best.label} finished first, in ${best.times.at(-1).toFixed(2)} seconds.`;
    }
    show();
    if (playing) next = requestAnimationFrame(frame);
  }

  function start() {
    if (playing) return;
    seen?.disconnect();
    if (now >= longest) now = 0;
    find(".announcement").textContent = "";
    playing = true;
    before = performance.now();
    show();
    cancelAnimationFrame(next);
    next = requestAnimationFrame(frame);
  }

  function pause() {
    playing = false;
    show();
  }

  function jump(moment) {
    seen?.disconnect();
    now = Math.min(longest, Math.max(0, moment));
    show();
  }

  function setSpeed(power) {
    slider.value = power;
    speed = 10 ** Number(slider.value);
    const text = `${Number(speed.toPrecision(2))}×`;
    find(".rate-text").textContent = text;
    slider.setAttribute("aria-valuetext", text);
    find(".pace").textContent = Math.abs(speed - 1) < 0.01 ? "real time" : `at ${text} real time`;
  }

  function restart() {
    playing = false;
    now = 0;
    start();
  }

  play.addEventListener("click", () => (playing ? pause() : start()));
  again.addEventListener("click", restart);
  seek.addEventListener("input", () => {
    playing = false;
    jump((Number(seek.value) / 1000) * longest);
  });
  slider.addEventListener("input", () => setSpeed(slider.value));
  heat.addEventListener("change", () => {
    load(Number(heat.value));
    now = 0;
    if (playing || still.matches) show();
    else start();
  });
  root.addEventListener("keydown", (event) => {
    if (event.target !== root || event.ctrlKey || event.metaKey || event.altKey) return;
    const power = Number(slider.value);
    const acts = {
      " ": () => (playing ? pause() : start()),
      r: restart,
      ArrowRight: () => jump(now + longest / 50),
      ArrowLeft: () => jump(now - longest / 50),
      "+": () => setSpeed(power + 0.1),
      "-": () => setSpeed(power - 0.1),
    };
    const act = acts[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const lane of lanes) {
      [lane.shown, lane.painted] = [-2, -1];
      draw(lane);
    }
  });

  load(0);
  setSpeed(Math.log10(Number(root.dataset.pace)));
  if (still.matches) {
    jump(longest); // reduced motion: the finished images, until play is pressed
  } else {
    show();
    seen = new IntersectionObserver((entries) => {
      if (entries.some((entry) => entry.isIntersecting)) start();
    }, { threshold: 0.35 });
    seen.observe(root);
  }
}
