"use strict";
const each = (root, query, act) => [...root.querySelectorAll(query)].forEach(act);
const still = matchMedia("(prefers-reduced-motion: reduce)");

function nearest(values, value) {
  return values.reduce((best, each) => Math.abs(each - value) < Math.abs(best - value) ? each : best);
}

/* One bar of controls for all pictures of an article. */
function look(media) {
  const bar = media.querySelector(".look");
  if (!bar) return;
  const article = media.closest("article");
  const ranges = [...bar.querySelectorAll(".scrub")].map((scrub) => ({
    scrub, axis: scrub.dataset.axis, input: scrub.querySelector("input"), output: scrub.querySelector("output"),
  }));
  const blinking = bar.querySelector(".blinking"), flip = blinking.querySelector("button");
  const itself = blinking.querySelector("input"), wipe = bar.querySelector(".wipe");
  const cover = wipe.querySelector("input");
  const reference = flip.textContent.replace("show the ", "");
  const view = () => media.dataset.view;

  const show = ({ axis, input, output, values }) => {
    const value = values[Number(input.value)];
    each(media, `.frames[data-axis=${axis}]`, (section) => {
      const triples = [...section.querySelectorAll(".triple")];
      const near = nearest(triples.map((t) => Number(t.dataset.index)), value);
      for (const triple of triples) triple.hidden = Number(triple.dataset.index) !== near;
    });
    output.textContent = `${axis} ${value}`;
    input.setAttribute("aria-valuetext", output.textContent);
    if (axis === "step") each(article, ".curve svg[data-first]", (svg) => mark(svg, value));
  };
  for (const range of ranges) {
    const found = [...media.querySelectorAll(`.frames[data-axis=${range.axis}] .triple`)];
    range.values = [...new Set(found.map((t) => Number(t.dataset.index)))].sort((a, b) => a - b);
    range.input.max = range.values.length - 1;
    range.scrub.hidden = range.values.length < 2;
    range.input.addEventListener("input", () => show(range));
    show(range);
  }
  media.goTo = (axis, value) => {
    const range = ranges.find((one) => one.axis === axis);
    if (!range) return;
    range.input.value = range.values.indexOf(nearest(range.values, value));
    show(range);
  };
  if (media.dataset.step) media.goTo("step", Number(media.dataset.step)); /* where it broke */
  each(article, ".curve svg[data-first]", (svg) => {
    if (!ranges.some((one) => one.axis === "step")) return;
    svg.addEventListener("click", (event) => {
      const { first, last, left, right } = svg.dataset;
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
      media.goTo("step", +first + (at - left) / (right - left) * (last - first));
    });
  });

  const turn = (side) => {
    media.dataset.side = side;
    flip.textContent = `show the ${side === "reference" ? "candidate" : reference}`;
  };
  const other = () => turn(media.dataset.side === "reference" ? "candidate" : "reference");
  const byHand = () => { itself.checked = false; other(); };
  itself.checked = !still.matches;
  setInterval(() => { if (view() === "blink" && itself.checked && !document.hidden) other(); }, 700);
  flip.addEventListener("click", byHand);
  cover.addEventListener("input", () => media.style.setProperty("--wipe", cover.value + "%"));
  const choose = (value) => {
    media.dataset.view = value;
    blinking.hidden = value !== "blink";
    wipe.hidden = value !== "swipe";
    turn("candidate");
  };
  each(bar, "input[type=radio]", (radio) => {
    if (radio.checked) choose(radio.value); /* a reloaded page keeps what was chosen */
    radio.addEventListener("change", () => choose(radio.value));
  });
  each(media, ".frames", (section) => {
    section.tabIndex = 0;
    section.setAttribute("role", "group");
    section.setAttribute("aria-label", section.querySelector("h3").textContent + ": arrow keys move, space flips");
    section.addEventListener("pointermove", (event) => {
      const triple = event.target.closest(".triple");
      if (view() !== "swipe" || !triple || !(event.buttons || event.pointerType === "mouse")) return;
      const box = triple.getBoundingClientRect();
      cover.value = Math.round(100 * (event.clientX - box.left) / box.width);
      cover.dispatchEvent(new Event("input"));
    });
    section.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const range = ranges.find((one) => one.axis === section.dataset.axis);
      if (event.target !== section || !move || !range) return;
      event.preventDefault();
      range.input.value = Number(range.input.value) + move;
      show(range);
    });
  });
  media.addEventListener("keydown", (event) => {
    if (event.key !== " " || view() !== "blink" || event.target.matches("button, audio, [type=checkbox]")) return;
    event.preventDefault();
    byHand();
  });
  bar.hidden = false;
}

/* Where a curve stands at a step. */
function mark(svg, step) {
  const { first, last, left, right } = svg.dataset;
  const share = +last > +first ? (step - first) / (last - first) : 0.5;
  svg.querySelector(".cursor").setAttribute("d", `M${+left + share * (right - left)} 20V228`);
}

/* Waveforms, spectrograms and players of a sound under one time. */
function listen(section) {
  const scrub = section.querySelector(".time");
  const sounds = [...section.querySelectorAll("audio")];
  const seconds = Number(section.dataset.seconds);
  if (!scrub || !(seconds > 0)) return;
  const input = scrub.querySelector("input"), output = scrub.querySelector("output");
  const media = section.closest(".media");
  const show = (at) => {
    input.value = Math.round(1000 * at / seconds);
    output.textContent = at.toFixed(2) + " s";
    input.setAttribute("aria-valuetext", at.toFixed(2) + " seconds");
    section.style.setProperty("--now", 100 * Math.min(at / seconds, 1) + "%");
    const clip = media.querySelector(".frames[data-clip]");
    if (!clip || !("whole" in section.dataset)) return;
    const last = Math.max(...[...clip.querySelectorAll(".triple")].map((t) => Number(t.dataset.index)));
    media.goTo("frame", last * at / seconds);
  };
  const seek = (at) => { for (const sound of sounds) sound.currentTime = at; show(at); };
  input.addEventListener("input", () => seek(seconds * input.value / 1000));
  each(section, ".seen", (seen) => seen.addEventListener("click", (event) => {
    const box = seen.getBoundingClientRect();
    seek(seconds * Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1));
  }));
  for (const sound of sounds) {
    sound.addEventListener("playing", () => {
      for (const other of sounds) if (other !== sound) other.pause();
    });
    sound.addEventListener("timeupdate", () => { if (!sound.paused) show(sound.currentTime); });
  }
  scrub.hidden = false;
  each(section, ".now", (line) => { line.hidden = false; });
}

each(document, ".media", look);
each(document, ".sound", listen);
each(document, "a[href^='#all']", (link) => {
  link.addEventListener("click", () => {
    document.querySelector(link.getAttribute("href") + " details").open = true;
  });
});
const data = document.getElementById("data").textContent;
document.getElementById("download").href =
  URL.createObjectURL(new Blob([data], { type: "application/json" }));
document.getElementById("offer").hidden = false;
