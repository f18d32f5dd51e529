-- Turns what Markdown in notebooks can say into Typst: folded solutions, raw HTML tables, numbered equations, link targets.

local function typst(text)
  return pandoc.RawBlock('typst', text)
end

-- Drop links within the document whose target is nowhere, since Typst refuses them.
local targets = {}

local function target(id)
  targets[id] = true
  return '#metadata("' .. id .. '") <' .. id .. '>'
end

local function quoted(text)
  return '"' .. text:gsub('["\\]', '\\%0'):gsub('%s+', ' ') .. '"'
end

-- Mathematics as Typst with its LaTeX as alternative text, which a screen reader reads and PDF/UA asks for.
local function spoken(math)
  local body = pandoc.write(pandoc.Pandoc({ pandoc.Plain({ math }) }), 'typst'):gsub('%s+$', '')
  return '#[#set math.equation(alt: ' .. quoted(math.text) .. ');' .. body
end

-- $$ ... \tag{3.1} $$ becomes a numbered equation with the label eq-3-1.
local function equation(math)
  local number = math.text:match('\\tag{([^}]*)}')
  local plain = math.text:gsub('%s*\\tag{[^}]*}', '')
  local body = spoken(pandoc.Math('DisplayMath', plain))
  if not number then
    return typst(body .. ']')
  end
  local id = 'eq-' .. number:gsub('%.', '-')
  targets[id] = true
  return typst('#numbered("(' .. number .. ')")[' .. body .. ' <' .. id .. '>]]')
end

local function inline_math(math)
  if math.mathtype == 'InlineMath' then
    return pandoc.RawInline('typst', spoken(math) .. ']')
  end
end

-- An image alone in its paragraph is a figure: its caption is what stands in the brackets, its alternative text an attribute,
-- or the caption's words.
local function figure(image)
  local caption = pandoc.Plain(image.caption):walk({ Math = inline_math })
  local body = pandoc.write(pandoc.Pandoc({ caption }), 'typst'):gsub('%s+$', '')
  local label = ''
  if image.identifier ~= '' then
    targets[image.identifier] = true
    label = ' <' .. image.identifier .. '>'
  end
  return typst('#figure(image("' .. image.src .. '", alt: ' .. quoted(image.attributes.alt or pandoc.utils.stringify(image.caption)) .. '), caption: [' .. body .. '])' .. label)
end

local function paragraph(block)
  if #block.content == 1 and block.content[1].t == 'Image' then
    return figure(block.content[1])
  end
  local blocks, inlines = pandoc.Blocks({}), pandoc.Inlines({})
  local function flush()
    if #inlines > 0 then
      blocks:insert(pandoc.Para(inlines))
      inlines = pandoc.Inlines({})
    end
  end
  for _, inline in ipairs(block.content) do
    if inline.t == 'Math' and inline.mathtype == 'DisplayMath' then
      flush()
      blocks:insert(equation(inline))
    else
      inlines:insert(inline)
    end
  end
  flush()
  return blocks
end

-- Raw HTML in the prose: <details> opens a framed block with its summary as heading; tables are read as tables; other tags vanish.
local function html_block(block)
  if block.format ~= 'html' then
    return nil
  end
  local text = block.text
  if text:match('^%s*</details>') then
    return typst(']')
  end
  local summary = text:match('<summary>(.-)</summary>')
  if text:match('^%s*<details') then
    return typst('#folded("' .. (summary or 'More'):gsub('["\\]', '\\%0') .. '")[')
  end
  local id = text:match('<span id="([^"]+)">')
  if id then
    return typst(target(id))
  end
  if text:match('<table') then
    return pandoc.read(text, 'html').blocks
  end
  return {}
end

local function html_inline(inline)
  if inline.format ~= 'html' then
    return nil
  end
  local id = inline.text:match('<span id="([^"]+)">')
  if id then
    return pandoc.RawInline('typst', target(id))
  end
  return {}
end

-- HTML and Markdown in outputs are whatever a notebook's code, or the data that it read, chose to show. So they come as code
-- blocks, which nothing inside can end, and are read here: no Typst in them runs, and they name no file, label or heading.
local readers = {
  ['output-html'] = 'html',
  ['output-markdown'] = 'commonmark_x-raw_html-raw_attribute-attributes-subscript-superscript-smart-emoji',
}

local function content(element)
  return element.content
end

local harmless = {
  Div = content,
  Span = content,
  RawBlock = function() return {} end,
  RawInline = function() return {} end,
  Image = function(image) return image.caption end,
  Header = function(header) return pandoc.Para({ pandoc.Strong(header.content) }) end,
  CodeBlock = function(block) return pandoc.CodeBlock(block.text, pandoc.Attr('', { block.classes[1] })) end,
  Code = function(code) return pandoc.Code(code.text) end,
  Table = function(tbl)
    tbl.attr = pandoc.Attr()
    return tbl
  end,
  Math = function(math)
    local warnings = pandoc.log.silence(pandoc.write, pandoc.Pandoc({ pandoc.Plain({ math }) }), 'typst')
    return #warnings > 0 and pandoc.Code(math.text) or math
  end,
  Link = function(link)
    local scheme = link.target:match('^([%w+.-]+):')
    if scheme == 'http' or scheme == 'https' or scheme == 'mailto' or link.target:match('^#') then
      return pandoc.Link(link.content, link.target)
    end
    return link.content
  end,
}

local function output(block)
  local reader = readers[block.classes[1]]
  if reader then
    return pandoc.read(block.text .. '\n', reader).blocks:walk(harmless)
  end
end

-- Columns of a table share the width by what they hold, so that long cells wrap and short ones do not;
-- a table that fits on a page is not cut.
local function sized_table(tbl)
  local simple = pandoc.utils.to_simple_table(tbl)
  local widths, words, total = {}, {}, 0
  local function measure(row)
    for column, cell in ipairs(row) do
      local length = 0
      for line in (pandoc.utils.stringify(pandoc.Div(cell)) .. '\n'):gmatch('(.-)\n') do
        length = math.max(length, utf8.len(line) or #line)
      end
      widths[column] = math.max(widths[column] or 3, math.min(length, 120))
      for word in pandoc.utils.stringify(pandoc.Div(cell)):gmatch('%S+') do
        words[column] = math.max(words[column] or 3, math.min(#word, 14))
      end
    end
  end
  measure(simple.headers)
  for _, row in ipairs(simple.rows) do
    measure(row)
  end
  for _, width in ipairs(widths) do
    total = total + width + 2
  end
  if total > 84 then
    local shares, sum = {}, 0
    for column, width in ipairs(widths) do
      shares[column] = math.max((width + 2) / total, ((words[column] or 3) + 3) / 84) -- no column narrower than its words
      sum = sum + shares[column]
    end
    for column, spec in ipairs(tbl.colspecs) do
      tbl.colspecs[column] = { spec[1], shares[column] / sum }
    end
  end
  if #simple.rows > 20 then
    return tbl
  end
  return { typst('#block(breakable: false)['), tbl, typst(']') }
end

local function collect(id)
  if id ~= '' then
    targets[id] = true
  end
end

return {
  { RawBlock = html_block, RawInline = html_inline, CodeBlock = output },
  { Para = paragraph, Table = sized_table },
  { Math = inline_math },
  {
    Header = function(header) collect(header.identifier) end,
    Span = function(span) collect(span.identifier) end,
    Div = function(div) collect(div.identifier) end,
  },
  {
    Link = function(link)
      local id = link.target:match('^#(.*)$')
      if id and not targets[id] then
        return link.content
      end
    end,
  },
}
